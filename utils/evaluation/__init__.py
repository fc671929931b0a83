"""Metrics, scores of every task on test data, head drift, routing.

May import utils.data, utils.process and utils.text; never models: it takes any object that has a learner's verbs.
"""
