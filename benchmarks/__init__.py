"""Slow studies, run by hand with `python -m benchmarks.<name>`; the results are in .md and .jsonl files of the same name.

May import everything of the program; never imported by it.
"""
