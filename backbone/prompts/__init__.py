"""Prompts and prefixes: learned tokens and keys that a query chooses.

May import the ViT of backbone/ and utils.process; never adapters, experts, heads or models.
"""
