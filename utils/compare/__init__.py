"""Many runs side by side: rows, paired tables, the comparison page.

May import utils.report, utils.evaluation, utils.run and below."""
