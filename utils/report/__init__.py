"""One run shown to people: console tables, plots, and the page report.html.

May import utils.run, utils.evaluation and what lies below; never compare or engines."""
