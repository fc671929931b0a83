"""One run shown to people: console tables, plots, and the page report.html.

May import utils.run, utils.evaluation, utils.config, utils.data, utils.files, utils.process and utils.text; never
utils.compare, utils.engines, backbone, models or commands.
"""
