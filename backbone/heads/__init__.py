"""What turns features into class scores: linear, nearest mean, ridge, Gaussians, subspaces.

May import the ViT of backbone/ and utils.process; never adapters, experts, prompts or models.
"""
