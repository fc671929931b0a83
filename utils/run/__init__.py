"""What a run keeps on disk: log, record, checkpoints, journal of the task in progress, sample images.

May import utils.evaluation, data, files, process, config and text; never the report."""
