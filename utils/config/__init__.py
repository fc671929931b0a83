"""What an experiment file may say: strict JSON, keys and their bounds, sweeps, older programs' names.

May import utils.data for the names of sets, utils.text, and nothing above."""
