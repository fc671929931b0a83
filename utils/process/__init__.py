"""This process: seeds, device, ranks, signals, stopwatch. The only global state of the program.

May import nothing else of the project but utils.text."""
