"""What every method is made of: the contract, the training loop, parameter groups, resumable phases.

May import backbone, utils.run and what lies below them; never a method, a family or a command."""
