"""Measurements, not tests: equality first, then medians of interleaved runs, each beside its physical limit."""
