"""Slow studies run by hand, each with its results beside it: `python -m benchmarks.<name>`."""
