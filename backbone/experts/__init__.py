"""Several experts in one layer: routers, their losses, mixtures, descriptors and novelty.

May import backbone.adapters, the ViT and utils; never heads, prompts or models."""
