"""Many runs side by side: rows, paired tables, plots, the comparison page.

May import utils.report, utils.evaluation, utils.run, utils.config, utils.files and utils.text; never engines,
backbone, models or commands.
"""
