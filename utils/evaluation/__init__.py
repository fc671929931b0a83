"""Metrics, scores of every task on test data, head drift, routing.

May import utils.data, utils.process and utils.text; takes any object with a learner's verbs."""
