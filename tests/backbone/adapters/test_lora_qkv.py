"""Updates of the fused qkv against weights changed in place, their gradients, and that nothing is left behind."""

import copy

import pytest
import torch

from backbone.adapters.lora import LoRA
from backbone.adapters.lora_qkv import FixedDown, QKVUpdates, sizes_of
from tests.helpers.toy import toy_backbone

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
WIDTH = 16
PLACES = {"q": slice(0, 16), "k": slice(16, 32), "v": slice(32, 48), "kv": slice(16, 48)}


def with_updates(parts, count, kind=LoRA):
    torch.manual_seed(1)
    backbone = toy_backbone().double()
    for layer in range(backbone.depth):
        slot = QKVUpdates(parts)
        for _ in range(count):
            made = {part: kind(*sizes_of(backbone, layer, part), 3).double() for part in parts}
            for lora in made.values():
                torch.nn.init.normal_(lora.up, std=0.2)
            slot.add(made)
        backbone.fill(layer, slot)
    return backbone


def changed(backbone, gates):
    """The same ViT without slots, the updates added to its weights."""
    plain = copy.deepcopy(backbone)
    for name, slot in backbone.slots.items():
        weight = plain.vit.blocks[int(name)].attn.qkv.weight.data
        for part in slot.parts:
            for gate, lora in zip(gates, slot.of(part), strict=True):
                weight[PLACES[part]] += gate * lora.up @ lora.down
    plain.slots.clear()
    return plain


@pytest.mark.parametrize("parts", [("q", "v"), ("kv",), ("k",), ("q", "k", "v")], ids=str)
@torch.no_grad()
def test_equal_to_changed_weights(parts):
    backbone = with_updates(parts, 3)
    torch.testing.assert_close(backbone(IMAGES), changed(backbone, [1, 1, 1])(IMAGES), rtol=0, atol=1e-13)
    gates = torch.tensor([[0.5, -2.0, 0.0]], dtype=torch.float64)
    weighed = backbone(IMAGES, route=lambda x: [gates] * 3)
    torch.testing.assert_close(weighed, changed(backbone, gates[0])(IMAGES), rtol=0, atol=1e-13)
    each = torch.tensor(
        [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.5, 0.5, 0.5]], dtype=torch.float64
    )  # a row for each image
    alone = [backbone(image[None], route=lambda x, g=g: [g[None]] * 3) for image, g in zip(IMAGES, each, strict=True)]
    torch.testing.assert_close(backbone(IMAGES, route=lambda x: [each] * 3), torch.cat(alone), rtol=0, atol=1e-13)


@torch.no_grad()
def test_without_updates_or_with_new_ones_the_block_is_timms():
    backbone, plain = toy_backbone().double(), toy_backbone().double()
    for layer in range(3):
        backbone.fill(layer, QKVUpdates(["kv"]))
    assert torch.equal(backbone(IMAGES), plain(IMAGES)) and len(backbone.slots["0"]) == 0
    for layer in range(3):
        backbone.slots[str(layer)].add({"kv": LoRA(*sizes_of(backbone, layer, "kv"), 2).double()})
    assert torch.equal(backbone(IMAGES), plain(IMAGES)) and len(backbone.slots["0"]) == 1


def test_no_hook_is_left_whatever_happens():
    backbone = with_updates(("q", "v"), 1)
    names = set(backbone.vit.state_dict())
    backbone(IMAGES)
    with pytest.raises(RuntimeError):  # gates for another number of updates
        backbone(IMAGES, route=lambda x: [torch.ones(1, 2, 5, dtype=torch.float64)] * 3)
    assert not any(m._forward_hooks for m in backbone.vit.modules()) and set(backbone.vit.state_dict()) == names


def test_gradients_of_factors_and_gates():
    backbone = with_updates(("q", "v"), 2)
    slot, block = backbone.slots["1"], backbone.vit.blocks[1]
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    gates = torch.tensor([[0.7, -0.3]], dtype=torch.float64, requires_grad=True)
    factors = [p for part in slot.parts for lora in slot.of(part) for p in lora.parameters()]
    assert torch.autograd.gradcheck(lambda x, gates, *_: slot(x, gates, block), (x, gates, *factors))


def test_a_fixed_down_is_saved_and_not_trained():
    lora = FixedDown(4, 6, 2)
    assert [name for name, _ in lora.named_parameters()] == ["up"] and set(lora.state_dict()) == {"up", "down"}
    assert lora.rank == 2 and lora(torch.ones(1, 4)).shape == (1, 6)
