"""Adapters: low-rank bottlenecks, LoRA, slow and fast ones, how they are merged, and peft's file format.

May import the ViT of backbone/ and utils; never experts, heads, prompts or models."""
