"""What some methods share: slow and fast adapters, prompts, experts, first sessions, feature spaces.

May import models.learner, models.settings, backbone with its packages, utils.data, utils.process and utils.text;
never a method or a command.
"""
