"""Adapters: low-rank bottlenecks, LoRA, slow and fast ones, how they are merged, and peft's file format.

May import the ViT of backbone/, utils.config, utils.files and utils.text; never experts, heads, prompts or models.
"""
