"""`tt.fuse`: frameworks' layers whose sequences run as one kernel."""
