"""Pre-training of the embedded backbone on formula-made images: `python -m backbone.pretrain`.

May import the ViT of backbone/, its weights and utils.data; never adapters or models."""
