"""This process: seeds, device, ranks, signals, stopwatch. The only global state of the program.

May import utils.text; never anything else of the project.
"""
