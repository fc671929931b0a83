"""Prompts and prefixes: learned tokens and keys that a query chooses.

May import the ViT of backbone/ and utils; never adapters, experts, heads or models."""
