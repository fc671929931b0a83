"""Slow studies run by hand, each with its results beside it: `python -m benchmarks.<name>`.

May import everything of the program; never imported by it.
"""
