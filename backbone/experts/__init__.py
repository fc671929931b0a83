"""Several experts in one layer: routers, their losses, mixtures, descriptors and novelty.

May import backbone.adapters, the ViT of backbone/ and utils.process; never heads, prompts or models.
"""
