"""What an experiment file may say: strict JSON, keys and their bounds, sweeps, older programs' names.

May import utils.data (the names of the data sets) and utils.text; never anything else of utils, backbone, models or
commands.
"""
