"""What a run keeps on disk: log, record, checkpoints, journal of the task in progress, sample images.

May import utils.evaluation, utils.data, utils.config, utils.files, utils.process and utils.text; never the report,
backbone, models or commands.
"""
