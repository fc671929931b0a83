"""What every runner of experiments needs and no method knows of: nine packages, each with one job, and utils.text.

May import one another from the bottom up (tests/contract/test_imports.py has the floors); never backbone, models or
commands.
"""
