"""What some methods share: slow and fast adapters, prompts, experts, first sessions, feature spaces.

May import models.learner, models.settings, backbone and utils; never a method or a command."""
