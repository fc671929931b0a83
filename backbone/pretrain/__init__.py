"""Pre-training of the embedded backbone on formula-made images: `python -m backbone.pretrain`.

May import the ViT of backbone/, its weights, utils.data and utils.process; never adapters, experts, heads, prompts or
models.
"""
