"""What every method builds on: the contract, the training loop, parameter groups, resumable phases.

May import backbone with its packages, utils.run and what lies below it; never a method, a family or a command.
"""
