"""Measurements: what they say is in ``benchmarks/results``, with date, versions and machine."""
