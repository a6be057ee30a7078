"""Benchmarks: a harness that checks before it times, and what it has measured."""
