"""Whole networks: read as a chain or from a recording, as the graph of one time step, and written in the target."""
