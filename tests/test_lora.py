"""LoRA on timm's linear layers: against a plain loop in float64, against the peft library, and peft's file format."""

import copy
import json

import pytest
import torch
from conftest import toy_backbone
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from backbone import routed
from backbone.lora import (
    TARGETS,
    Bundle,
    LoRA,
    attach,
    attached,
    bundle,
    detach,
    merge,
    merge_bundles,
    mixture,
    put,
    set_gates,
)
from backbone.peft_format import CONFIG, WEIGHTS, load_peft, save_peft
from models.base import Learner

ALL = list(TARGETS)
IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft", reason="the peft library is not installed (pip install -r requirements-dev.txt)")


def stirred(backbone, seed=3):
    """Every expert of `backbone` with weights unlike its start, so that none adds zero."""
    generator = torch.Generator().manual_seed(seed)
    for experts in attached(backbone).values():
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return backbone


def with_experts(targets=ALL, experts=1, rank=2, **other):
    backbone = toy_backbone()
    attach(backbone, targets, experts, rank, **other)
    return stirred(backbone)


def loras_of(ranks, inputs=4, outputs=6, alpha=3.0, dtype=torch.float64):
    torch.manual_seed(0)
    made = [LoRA(inputs, outputs, rank, alpha).to(dtype) for rank in ranks]
    for parameter in (p for lora in made for p in lora.parameters()):
        torch.nn.init.normal_(parameter)
    return made


def loop(x, experts, gates):
    gates = torch.ones(len(x), len(experts), dtype=x.dtype) if gates is None else gates
    gates = gates.unsqueeze(1) if gates.dim() == 2 else gates
    return sum(gates[..., i : i + 1] * (e.alpha / e.rank) * (x @ e.down.T @ e.up.T) for i, e in enumerate(experts))


# The kernel ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(3,), (2, 2), (1, 4, 2)])
@pytest.mark.parametrize("shape", [None, (3,), (3, 5)], ids=["ungated", "per sample", "per token"])
def test_equals_the_loop_with_its_gradients(ranks, shape):
    experts = loras_of(ranks)
    x = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    gates = None if shape is None else torch.randn(*shape, len(ranks), dtype=torch.float64, requires_grad=True)
    inputs = [x, *(p for e in experts for p in e.parameters()), *([] if gates is None else [gates])]
    ours, plain = mixture(x, experts, gates), loop(x, experts, gates)
    weight = torch.randn_like(plain)
    assert ours.shape == (3, 5, 6) and (ours - plain).abs().max() < 1e-12
    pairs = zip(torch.autograd.grad(ours, inputs, weight), torch.autograd.grad(plain, inputs, weight), strict=True)
    assert all((a - b).abs().max() < 1e-12 for a, b in pairs)


@pytest.mark.parametrize("shape", [(2, 2), (2, 3, 2)])
def test_gradcheck(shape):
    experts = loras_of((2, 1))
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    parameters = tuple(p for e in experts for p in e.parameters())
    assert torch.autograd.gradcheck(lambda x, g, *_: mixture(x, experts, g), (x, gates, *parameters))


@pytest.mark.parametrize("shape", [(1, 2), (3, 1), (2,), (3, 1, 2), (3, 5, 3), (1, 5, 2)])
def test_gates_never_spread_over_samples_or_tokens_in_silence(shape):
    with pytest.raises(ValueError, match=r"\[3, 2\] \(samples, experts\) or \[3, 5, 2\] \(samples, tokens, experts\)"):
        mixture(torch.zeros(3, 5, 4, dtype=torch.float64), loras_of((2, 2)), torch.ones(shape, dtype=torch.float64))


def test_a_gate_of_zero_gives_exactly_zero_gradient():
    experts = loras_of((2, 3))
    gates = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(3, 2)
    mixture(torch.randn(3, 5, 4, dtype=torch.float64), experts, gates).square().sum().backward()
    assert all(not p.grad.any() for p in experts[1].parameters())
    assert all(p.grad.any() for p in experts[0].parameters())


@pytest.mark.parametrize("weights", [(0, 1, 0), (0.5, -2, 3), (0.25, 0, 1)])
def test_merged_experts_are_their_weighted_sum(weights):
    experts = loras_of((1, 3, 2))
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    whole = merge(experts, weights)
    assert (whole(x) - loop(x, experts, torch.tensor([weights] * 2, dtype=torch.float64))).abs().max() < 1e-12
    assert whole.rank == sum(e.rank for e, w in zip(experts, weights, strict=True) if w)
    if weights == (0, 1, 0):  # one alone keeps its factors and its alpha
        assert torch.equal(whole.down, experts[1].down) and torch.equal(whole.up, experts[1].up) and whole.alpha == 3
    with pytest.raises(ValueError, match="one weight for each of 3 experts"):
        merge(experts, (0, 0, 0))


# On the backbone ----------------------------------------------------------------------------------------------------


def test_attached_and_detached_the_vit_is_timms_own():
    plain, backbone = toy_backbone(), toy_backbone()
    names, modules = list(backbone.vit.state_dict()), dict(backbone.vit.named_modules())
    timms = plain.vit(IMAGES)
    attach(backbone, ALL, 2, 3)
    assert torch.equal(backbone(IMAGES), timms)  # fresh experts add exactly 0
    stirred(backbone)
    assert (backbone(IMAGES) - timms).abs().max() > 0.1
    assert list(backbone.vit.state_dict()) == names and dict(backbone.vit.named_modules()) == modules
    backbone(IMAGES).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in backbone.vit.parameters())
    assert all(torch.equal(a, b) for a, b in zip(backbone.vit.parameters(), plain.vit.parameters(), strict=True))
    detach(backbone)
    assert torch.equal(backbone(IMAGES), timms) and not attached(backbone) and not list(backbone.lora.parameters())
    assert not any(module._forward_hooks for module in backbone.modules())


def test_every_target_of_every_layer_adds_what_the_formula_says():
    """Hooks of our own see each linear layer's input and output."""
    backbone = with_experts(experts=2, alpha=5).double()
    gates = torch.randn(3, 5, 2, dtype=torch.float64)
    set_gates(backbone, gates)
    seen = {}
    for (layer, target), experts in attached(backbone).items():
        linear = backbone.vit.blocks[layer].get_submodule(TARGETS[target])
        linear.register_forward_hook(lambda m, i, o, key=(layer, target, experts): seen.update({key: (m, i[0], o)}))
    backbone(IMAGES)
    assert sorted(k[:2] for k in seen) == sorted((layer, target) for layer in range(3) for target in ALL)
    for (_, _, experts), (linear, x, out) in seen.items():
        wanted = x @ linear.weight.T + linear.bias + loop(x, list(experts.experts), gates)
        assert (out - wanted).abs().max() < 1e-12


def test_gates_choose_experts_by_sample_and_by_layer():
    backbone = with_experts(experts=2)
    alone = []
    for index in range(2):
        other = with_experts(experts=2)
        for experts in attached(other).values():
            experts.experts = experts.experts[index : index + 1]
        alone.append(other(IMAGES))
    set_gates(backbone, torch.tensor([[1.0, 0], [0, 1], [1, 0]]))
    wanted = torch.stack([alone[0][0], alone[1][1], alone[0][2]])
    torch.testing.assert_close(backbone(IMAGES), wanted, rtol=0, atol=1e-5)
    set_gates(backbone, None)
    both = backbone(IMAGES)
    set_gates(backbone, torch.zeros(3, 2), layer=2)
    for place, experts in attached(backbone).items():
        assert (experts.gates is None) == (place[0] != 2)
    assert not torch.allclose(backbone(IMAGES), both)
    set_gates(backbone, torch.zeros(3, 2))
    torch.testing.assert_close(backbone(IMAGES), toy_backbone()(IMAGES), rtol=0, atol=0)


def test_ragged_ranks_growth_and_freezing():
    backbone = with_experts(["qkv"], experts=1, rank=2, layers=[1])
    before = backbone(IMAGES)
    (experts,) = attached(backbone).values()
    experts.experts.append(LoRA(16, 48, 5))
    torch.testing.assert_close(backbone(IMAGES), before, rtol=0, atol=1e-6)  # a new expert adds 0
    experts.experts[0].requires_grad_(False)
    backbone(IMAGES).sum().backward()
    assert experts.experts[0].up.grad is None and experts.experts[1].up.grad.any()


def test_dropout_acts_in_training_on_what_the_experts_read():
    backbone = with_experts(["fc1"], layers=[2], dropout=0.5)
    (experts,) = attached(backbone).values()
    x = torch.randn(2, 5, 16)
    assert torch.equal(experts(x), mixture(x, list(experts.experts)))  # attached in the backbone's mode, evaluation
    backbone.train()
    torch.manual_seed(0)
    ours = experts(x)
    torch.manual_seed(0)
    assert torch.equal(ours, mixture(F.dropout(x, 0.5), list(experts.experts)))
    assert not backbone.vit.training


def test_a_deep_copy_has_experts_of_its_own():
    backbone = with_experts()
    before = backbone(IMAGES)
    twin = copy.deepcopy(backbone)
    torch.nn.init.zeros_(attached(twin)[0, "qkv"].experts[0].up)
    assert torch.equal(backbone(IMAGES), before) and not torch.equal(twin(IMAGES), before)
    detach(twin)
    assert torch.equal(twin(IMAGES), toy_backbone()(IMAGES)) and torch.equal(backbone(IMAGES), before)


def test_a_checkpoint_holds_the_experts_and_not_the_vit(toy_learner):
    learner = toy_learner("simplecil")
    attach(learner.backbone, ["proj"], 2, 3, layers=[0, 2], place=learner.place)
    names = [n for n in Learner.own_state(learner) if n.startswith("backbone.")]
    assert names == [f"backbone.lora.{i}.proj.experts.{e}.{p}" for i in (0, 2) for e in (0, 1) for p in ("down", "up")]
    again = toy_learner("simplecil", backbone=toy_backbone())
    attach(again.backbone, ["proj"], 1, 3, layers=[2], place=again.place)
    ours, theirs = (attached(each.backbone)[2, "proj"].experts[0].down for each in (learner, again))
    assert torch.equal(ours, theirs)  # start values come from the name alone


def test_lower_precision_passes_with_gates():
    backbone = with_experts(experts=2).to(torch.bfloat16)
    set_gates(backbone, torch.rand(3, 2))
    assert backbone(IMAGES).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: attach(b, ["pro"], 1, 2), "'pro' is unknown, qkv, proj, fc1, fc2 are known; did you mean 'proj'"),
        (lambda b: attach(b, ["qkv"], 1, 2, layers=[0, 3]), r"layer 3 does not exist, the backbone has layers 0\.\.2"),
        (lambda b: attach(b, ["qkv", "qkv"], 1, 2), "each named once"),
        (lambda b: attach(b, [], 1, 2), "needs targets and layers"),
        (lambda b: attach(b, ["qkv"], 0, 2), "at least 1 LoRA expert"),
        (lambda b: attach(b, ["qkv"], 1, 0), "rank of at least 1, got 0"),
        (lambda b: put(b, 0, "fc2", [LoRA(16, 64, 2)]), "fc2 of layer 0 maps 64 to 16, a LoRA 16 to 64"),
        (lambda b: set_gates(b, None), "no LoRA experts are attached"),
    ],
)
def test_bad_input_is_refused_before_anything_is_attached(call, message):
    backbone = toy_backbone()
    with pytest.raises(ValueError, match=message):
        call(backbone)
    assert not attached(backbone) and not any(module._forward_hooks for module in backbone.modules())


def test_attaching_twice_and_gates_of_other_experts_are_refused():
    backbone = with_experts(["qkv"], experts=2)
    with pytest.raises(ValueError, match="has LoRA experts already"):
        attach(backbone, ["fc1", "qkv"], 1, 2)
    assert {target for _, target in attached(backbone)} == {"qkv"}
    with pytest.raises(ValueError, match=r"of 2 experts are expected, got shape \[3, 4\]"):
        set_gates(backbone, torch.ones(3, 4))
    with pytest.raises(ValueError, match="attached to layer 7"):
        set_gates(backbone, None, layer=7)
    set_gates(backbone, torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"gates of shape \[4, 2\] do not fit"):
        backbone(IMAGES)


# Against peft -------------------------------------------------------------------------------------------------------


def same(ours, theirs):
    """Features are of unit size (the ViT's last norm), so 1e-6 of that and of the value is float32's own rounding."""
    tolerance = 1e-6 if ours.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def modules_of(backbone):
    return {place: f"blocks.{place[0]}.{TARGETS[place[1]]}" for place in attached(backbone)}


def peft_twin(peft, backbone):
    """peft's model on a copy of the same ViT, an adapter "e0", "e1", .. for each expert, all with our weights."""
    names = modules_of(backbone)
    first = next(iter(attached(backbone).values())).experts
    configs = [peft.LoraConfig(r=e.rank, lora_alpha=e.alpha, target_modules=list(names.values())) for e in first]
    plain = toy_backbone().vit.to(first[0].down.dtype)
    model = peft.get_peft_model(plain, configs[0], adapter_name="e0")
    for index, config in enumerate(configs[1:], start=1):
        model.add_adapter(f"e{index}", config)
    with torch.no_grad():
        for place, name in names.items():
            theirs = model.base_model.model.get_submodule(name)
            for index, lora in enumerate(attached(backbone)[place].experts):
                theirs.lora_A[f"e{index}"].weight.copy_(lora.down)
                theirs.lora_B[f"e{index}"].weight.copy_(lora.up)
    return model.eval()


@pytest.mark.parametrize("targets", [ALL, ["qkv"], ["proj"], ["fc1"], ["fc2"]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_expert_equals_peft(peft, targets, dtype):
    backbone = with_experts(targets, rank=3, alpha=4).to(dtype)
    model = peft_twin(peft, backbone)
    ours, theirs = backbone(IMAGES), model(IMAGES.to(dtype))
    assert ours.dtype == dtype and (ours - toy_backbone()(IMAGES)).abs().max() > 0.01
    same(ours, theirs)


def test_one_experts_gradients_equal_pefts(peft):
    backbone = with_experts(rank=3, alpha=4).double()
    model = peft_twin(peft, backbone)
    backbone(IMAGES).square().sum().backward()
    model(IMAGES.double()).square().sum().backward()
    for place, name in modules_of(backbone).items():
        theirs, ours = model.base_model.model.get_submodule(name), attached(backbone)[place].experts[0]
        assert ours.up.grad.any()
        torch.testing.assert_close(ours.down.grad, theirs.lora_A["e0"].weight.grad, rtol=0, atol=1e-10)
        torch.testing.assert_close(ours.up.grad, theirs.lora_B["e0"].weight.grad, rtol=0, atol=1e-10)


def test_without_gates_all_experts_equal_all_active_peft_adapters(peft):
    backbone = with_experts(experts=3, alpha=1)
    model = peft_twin(peft, backbone)
    model.base_model.set_adapter(["e0", "e1", "e2"])
    same(backbone(IMAGES), model(IMAGES))


@pytest.mark.parametrize("per", ["sample", "token"])
def test_fixed_gates_equal_pefts_weighted_adapters(peft, per):
    """Each sample has gates of its own, and in peft a weighted adapter of its own."""
    backbone = with_experts(experts=3, alpha=1)
    model = peft_twin(peft, backbone)
    gates = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.25, 0.75], [0.0, 0.0, 1.0]])
    set_gates(backbone, gates if per == "sample" else gates.unsqueeze(1).expand(3, 5, 3))
    ours = backbone(IMAGES)
    for index, weights in enumerate(gates.tolist()):
        model.add_weighted_adapter(["e0", "e1", "e2"], weights, f"mix{index}", combination_type="cat")
        model.set_adapter(f"mix{index}")
        same(ours[index : index + 1], model(IMAGES[index : index + 1]))


# peft's files -------------------------------------------------------------------------------------------------------


def taken(backbone, weights):
    return {place: merge(list(e.experts), weights) for place, e in attached(backbone).items()}


def imported(folder):
    backbone = toy_backbone()
    for (layer, target), lora in load_peft(folder, backbone).items():
        put(backbone, layer, target, [lora])
    return backbone


def same_function(folder, reference):
    same(imported(folder)(IMAGES), reference)


def quiet_load(peft, folder):
    return peft.PeftModel.from_pretrained(toy_backbone().vit, str(folder)).eval()


@pytest.mark.parametrize("weights", [(0, 1, 0), (0.5, 1, 0.25)], ids=["one expert", "consolidated"])
def test_peft_loads_what_we_export(peft, tmp_path, weights, recwarn):
    backbone = with_experts(experts=3, alpha=3)
    save_peft(tmp_path, taken(backbone, weights), "toy")
    set_gates(backbone, torch.tensor([weights], dtype=torch.float32).expand(3, 3))
    ours = backbone(IMAGES)
    same(quiet_load(peft, tmp_path)(IMAGES), ours)
    assert not [w for w in recwarn if "missing" in str(w.message)]
    same_function(tmp_path, ours)


def test_ranks_and_alphas_by_layer_survive_both_ways(peft, tmp_path):
    backbone = toy_backbone()
    for index, (layer, target) in enumerate([(0, "qkv"), (0, "fc2"), (1, "proj"), (2, "proj")]):
        linear = backbone.vit.blocks[layer].get_submodule(TARGETS[target])
        put(backbone, layer, target, [LoRA(linear.in_features, linear.out_features, 2 + index % 3, 1.5 + index)])
    stirred(backbone)
    ours = backbone(IMAGES)
    save_peft(tmp_path / "ours", taken(backbone, [1]))
    model = quiet_load(peft, tmp_path / "ours")
    same(model(IMAGES), ours)
    model.save_pretrained(tmp_path / "theirs")
    same_function(tmp_path / "theirs", ours)
    found = load_peft(tmp_path / "theirs", toy_backbone())
    assert {place: (lora.rank, lora.alpha) for place, lora in found.items()} == {
        place: (e.experts[0].rank, e.experts[0].alpha) for place, e in attached(backbone).items()
    }


def test_we_import_what_peft_saved(peft, tmp_path):
    """Written by peft with short target names and patterns, as people do."""
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["qkv", "attn.proj", "mlp.fc1"], rank_pattern={"fc1": 3},
        alpha_pattern={"blocks.1.attn.qkv": 5}, lora_dropout=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = peft.get_peft_model(toy_backbone().vit, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    same_function(tmp_path, model(IMAGES))
    found = load_peft(tmp_path, toy_backbone())
    assert found[1, "qkv"].scale == 2.5 and found[0, "fc1"].scale == 2 and found[0, "qkv"].scale == 3


def test_round_trip_without_peft_is_exact(tmp_path):
    backbone = with_experts(alpha=3).double()
    save_peft(tmp_path, taken(backbone, [1]))
    back = load_peft(tmp_path, toy_backbone().double())
    assert set(back) == set(attached(backbone))
    for place, lora in back.items():
        ours = attached(backbone)[place].experts[0]
        assert torch.equal(lora.down, ours.down) and torch.equal(lora.up, ours.up) and lora.scale == ours.scale
        assert lora.down.dtype == torch.float64


def spoil_config(**values):
    def spoil(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | values))

    return spoil


def spoil_weights(change):
    def spoil(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return spoil


A0 = "base_model.model.blocks.0.attn.qkv.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / CONFIG).unlink(), "there is no file .*adapter_config.json"),
        (lambda f: (f / WEIGHTS).unlink(), "only safetensors are read"),
        (lambda f: (f / WEIGHTS).write_bytes(b"PK\x03\x04 pickled"), "damaged or cannot be read"),
        (lambda f: (f / CONFIG).write_text("[1]"), "an object .* is expected"),
        (spoil_config(peft_type="LOHA"), "peft_type: 'LORA' is expected, got 'LOHA'"),
        (spoil_config(use_rslora=True), "use_rslora: True changes what the adapter computes"),
        (spoil_config(modules_to_save=["head"]), "modules_to_save"),
        (spoil_config(some_new_trick={"x": 1}), "some_new_trick"),
        (spoil_config(bias="lora_only"), "bias: 'none' is expected"),
        (spoil_config(init_lora_weights="pissa"), "'pissa' changes the frozen weights"),
        (spoil_config(r=3), "blocks.0.attn.qkv has rank 3 there, 2 in adapter_model"),
        (spoil_config(r=True), "r: a rank, a whole number from 1 is expected, got True"),
        (spoil_config(lora_alpha="8"), "lora_alpha: a number is expected, got '8'"),
        (spoil_config(lora_alpha=float("nan")), "lora_alpha"),
        (spoil_config(alpha_pattern={"(": 1}), "is no pattern"),
        (spoil_config(rank_pattern=[2]), "rank_pattern: an object"),
        (spoil_weights(lambda t: t.clear()), "it is empty"),
        (spoil_weights(lambda t: t.pop(A0)), "blocks.0.attn.qkv: lora_A is missing"),
        (spoil_weights(lambda t: t.update({A0: torch.ones(2, 9)})), r"A \[R, 16\] and B \[48, R\] are expected"),
        (spoil_weights(lambda t: t.update({A0: torch.full((2, 16), torch.inf)})), "a finite matrix is expected"),
        (spoil_weights(lambda t: t.update({A0: torch.ones(2, 16).int()})), "a finite matrix is expected"),
        (spoil_weights(lambda t: t.update({A0.replace("0", "7"): t[A0] + 0})), "layer 7 does not exist"),
        (spoil_weights(lambda t: t.update({A0.replace("qkv", "norm"): t[A0] + 0})), "attn.norm.lora_A.weight: unexpected"),
        (spoil_weights(lambda t: t.update({A0.replace("lora_A", "lora_magnitude_vector"): t[A0] + 0})), "unexpected"),
    ],
)  # fmt: skip
def test_whatever_is_no_plain_lora_of_this_backbone_is_refused(tmp_path, spoil, message):
    save_peft(tmp_path, taken(with_experts(["qkv"], layers=[0, 1]), [1]))
    load_peft(tmp_path, toy_backbone())
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_peft(tmp_path, toy_backbone())


def test_nothing_to_export_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no LoRA to export"):
        save_peft(tmp_path / "x", {})
    assert not (tmp_path / "x").exists()


# Experts of the routed learner ------------------------------------------------------------------------------------------


def routed_experts(experts, targets=ALL, alpha=4.0):
    """A backbone with `LinearExperts` by hooks, and one with the same experts in routed slots."""
    hooked, backbone = with_experts(targets, experts=experts, rank=3, alpha=alpha), toy_backbone()
    for layer in range(3):
        slot = routed.RoutedLinears()
        for e in range(experts):
            slot.add(Bundle({target: attached(hooked)[layer, target].experts[e] for target in targets}))
        backbone.fill(layer, slot)
    return hooked, backbone


@pytest.mark.parametrize("targets", [ALL, ["qkv"], ["proj"], ["fc1"], ["fc2"]], ids=str)
def test_one_routed_expert_equals_peft(peft, targets):
    hooked, backbone = routed_experts(1, targets)
    routed.attach_router(backbone, "shared")  # of one expert: gate 1
    same(backbone(IMAGES), peft_twin(peft, hooked)(IMAGES))
    assert (backbone(IMAGES) - toy_backbone()(IMAGES)).abs().max() > 0.01


def test_routed_experts_without_a_router_equal_all_active_peft_adapters(peft):
    hooked, backbone = routed_experts(3, alpha=1)
    model = peft_twin(peft, hooked)
    model.base_model.set_adapter(["e0", "e1", "e2"])
    same(backbone(IMAGES), model(IMAGES))


@pytest.mark.parametrize("per", ["sample", "token"])
def test_routed_slots_equal_experts_with_the_same_gates_by_hooks(per):
    hooked, backbone = routed_experts(2)
    gates = torch.rand((3, 2) if per == "sample" else (3, 5, 2))
    set_gates(hooked, gates)
    assert torch.equal(backbone(IMAGES, route=lambda x: [gates] * 3), hooked(IMAGES))


def test_a_bundle_starts_at_zero_and_merges_target_by_target():
    backbone = toy_backbone().double()
    made = [bundle(backbone, 0, ["qkv", "fc1"], rank).double() for rank in (2, 3)]
    assert made[0].targets == ("qkv", "fc1") and made[1].rank == 3
    assert not any(lora.up.any() for one in made for lora in one.loras.values())
    for parameter in (p for one in made for p in one.parameters()):
        torch.nn.init.normal_(parameter)
    whole = merge_bundles(made, [1.0, -0.3])
    assert whole.rank == 5
    for target in ("qkv", "fc1"):
        x = torch.randn(2, 5, 16, dtype=torch.float64)
        wanted = made[0][target](x) - 0.3 * made[1][target](x)
        assert (whole[target](x) - wanted).abs().max() < 1e-12


def test_bundles_of_unknown_targets_or_several_ranks_are_refused():
    with pytest.raises(ValueError, match="'pro' is unknown"):
        bundle(toy_backbone(), 0, ["pro"], 2)
    with pytest.raises(ValueError, match=r"got ranks \[1, 2\]"):
        Bundle({"qkv": LoRA(4, 4, 1), "proj": LoRA(4, 4, 2)})
    with pytest.raises(ValueError, match=r"got ranks \[\]"):
        Bundle({})
