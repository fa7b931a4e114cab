"""Benchmarks: ratios of times within one process, and the memory of compiled programs."""
