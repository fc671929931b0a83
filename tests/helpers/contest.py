"""What tests of moe_parallel share: copies and scores of one expert, and a rigged winner."""

import torch

from tests.helpers.nested import images_of
from tests.helpers.toy import toy_stream


def logits(learner, k=None, head=None):
    """All scores [B, 6] of slow and fast expert k, or of what is shown."""
    learner.eval()
    for nested in learner.backbone.slots.values():
        if k is not None:
            nested.use("combined", [k])
    with torch.no_grad():
        return (head or learner.head)(learner.backbone(images_of(toy_stream())))


def tensors(learner, k):
    """Slow, fast expert k and its head, as copies."""
    heads = learner.heads()
    parts = [a for nested in learner.backbone.slots.values() for a in (nested.slow, nested.fast[k])]
    return [p.detach().clone() for part in (*parts, heads[min(k, len(heads) - 1)]) for p in part.parameters()]


def rig(learner, winner):
    """Makes `winner` win: the others predict the opposite of what it does. Training is untouched."""
    real = learner._branch_scores

    def scores(images, count):
        made = real(images, count)
        if not learner.training:
            made = torch.stack([made[winner] if k == winner else -made[winner] for k in range(count)])
        return made

    learner._branch_scores = scores
    return learner
