"""LoRA on timm's linear layers: against a plain loop in float64, against the peft library, and peft's file format."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from backbone.adapters.lora import TARGETS, Bundle, LoRA, bundle, linear_of, merge, merge_bundles, mixture
from backbone.adapters.peft_format import CONFIG, WEIGHTS, load_peft, save_peft
from backbone.experts import routed
from models.learner.base import Learner
from tests.helpers.toy import toy_backbone

ALL = list(TARGETS)
IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft", reason="the peft library is not installed (pip install -r requirements-dev.txt)")


def stirred(backbone, seed=3):
    """Every expert of `backbone` with weights unlike its start, so that none adds zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in backbone.slots.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return backbone


def fill(backbone, experts):
    """Puts experts, each a LoRA by (layer, target), into slots of their layers."""
    for layer in sorted({layer for layer, _ in experts[0]}):
        slot = routed.RoutedLinears()
        for expert in experts:
            slot.add(Bundle({target: lora for (number, target), lora in expert.items() if number == layer}))
        backbone.fill(layer, slot)
    return backbone


def fresh(backbone, targets=ALL, rank=2, layers=range(3), alpha=None):
    """A new expert by (layer, target), which adds 0."""
    linears = {(layer, target): linear_of(backbone, layer, target) for layer in layers for target in targets}
    return {place: LoRA(at.in_features, at.out_features, rank, alpha) for place, at in linears.items()}


def with_experts(targets=ALL, experts=1, **other):
    backbone = toy_backbone()
    return stirred(fill(backbone, [fresh(backbone, targets, **other) for _ in range(experts)]))


def experts_of(backbone):
    """Each expert as LoRAs by (layer, target)."""
    return [routed.loras_of(backbone, e) for e in range(len(routed.routed_layers(backbone)[0]))]


def fixed(gates):
    """A route with the same gates for all three layers."""
    return lambda x: [gates] * 3


def some_loras(ranks, inputs=4, outputs=6, alpha=3.0, dtype=torch.float64):
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
    experts = some_loras(ranks)
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
    experts = some_loras((2, 1))
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    parameters = tuple(p for e in experts for p in e.parameters())
    assert torch.autograd.gradcheck(lambda x, g, *_: mixture(x, experts, g), (x, gates, *parameters))


@pytest.mark.parametrize("shape", [(1, 2), (3, 1), (2,), (3, 1, 2), (3, 5, 3), (1, 5, 2)])
def test_gates_never_spread_over_samples_or_tokens_in_silence(shape):
    with pytest.raises(ValueError, match=r"\[3, 2\] \(samples, experts\) or \[3, 5, 2\] \(samples, tokens, experts\)"):
        mixture(torch.zeros(3, 5, 4, dtype=torch.float64), some_loras((2, 2)), torch.ones(shape, dtype=torch.float64))


def test_a_gate_of_zero_gives_exactly_zero_gradient():
    experts = some_loras((2, 3))
    gates = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(3, 2)
    mixture(torch.randn(3, 5, 4, dtype=torch.float64), experts, gates).square().sum().backward()
    assert all(not p.grad.any() for p in experts[1].parameters())
    assert all(p.grad.any() for p in experts[0].parameters())


@pytest.mark.parametrize("weights", [(0, 1, 0), (0.5, -2, 3), (0.25, 0, 1)])
def test_merged_experts_are_their_weighted_sum(weights):
    experts = some_loras((1, 3, 2))
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    whole = merge(experts, weights)
    assert (whole(x) - loop(x, experts, torch.tensor([weights] * 2, dtype=torch.float64))).abs().max() < 1e-12
    assert whole.rank == sum(e.rank for e, w in zip(experts, weights, strict=True) if w)
    if weights == (0, 1, 0):  # one alone keeps its factors and its alpha
        assert torch.equal(whole.down, experts[1].down) and torch.equal(whole.up, experts[1].up) and whole.alpha == 3
    with pytest.raises(ValueError, match="one weight for each of 3 experts"):
        merge(experts, (0, 0, 0))


# On the backbone ----------------------------------------------------------------------------------------------------


def test_with_experts_and_without_them_the_vit_is_timms_own():
    plain, backbone = toy_backbone(), toy_backbone()
    names, modules = list(backbone.vit.state_dict()), dict(backbone.vit.named_modules())
    timms = plain.vit(IMAGES)
    fill(backbone, [fresh(backbone, rank=3) for _ in range(2)])
    assert torch.equal(backbone(IMAGES), timms)  # fresh experts add exactly 0
    stirred(backbone)
    assert (backbone(IMAGES) - timms).abs().max() > 0.1
    assert list(backbone.vit.state_dict()) == names and dict(backbone.vit.named_modules()) == modules
    backbone(IMAGES).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in backbone.vit.parameters())
    assert all(torch.equal(a, b) for a, b in zip(backbone.vit.parameters(), plain.vit.parameters(), strict=True))
    assert not any(module._forward_hooks for module in backbone.modules())
    backbone.slots.clear()
    assert torch.equal(backbone(IMAGES), timms)


def watched(backbone, gates):
    """A pass with these gates in all layers: each linear layer's module, input and output by (layer, target).

    Our hooks are set when a block begins and so run after the experts' own."""
    seen, hooks = {}, []

    def watch(layer, block):
        for target, name in TARGETS.items():
            keep = lambda m, i, o, place=(layer, target): seen.update({place: (m, i[0], o)})  # noqa: E731
            hooks.append(block.get_submodule(name).register_forward_hook(keep))

    for layer, block in enumerate(backbone.vit.blocks):
        hooks.append(block.register_forward_pre_hook(lambda block, inputs, layer=layer: watch(layer, block)))
    backbone(IMAGES, route=fixed(gates))
    for hook in hooks:
        hook.remove()
    assert sorted(seen) == sorted((layer, target) for layer in range(3) for target in ALL)
    return seen


def test_every_target_of_every_layer_adds_what_the_formula_says():
    backbone = with_experts(experts=2, alpha=5).double()
    gates, experts = torch.randn(3, 5, 2, dtype=torch.float64), experts_of(backbone)
    for place, (linear, x, out) in watched(backbone, gates).items():
        wanted = x @ linear.weight.T + linear.bias + loop(x, [expert[place] for expert in experts], gates)
        assert (out - wanted).abs().max() < 1e-12


def test_gates_choose_experts_by_sample_and_by_layer():
    """In float64: without a slot the last block is computed for one token, which rounds differently."""
    images, plain, backbone = IMAGES.double(), toy_backbone().double(), with_experts(experts=2).double()
    alone = [fill(toy_backbone().double(), [expert])(images) for expert in experts_of(backbone)]
    ours = backbone(images, route=fixed(torch.tensor([[1.0, 0], [0, 1], [1, 0]]).double()))
    wanted = torch.stack([alone[0][0], alone[1][1], alone[0][2]])
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    none, all_act = torch.zeros(3, 2).double(), torch.ones(3, 2).double()
    below = fill(toy_backbone().double(), [{k: v for k, v in e.items() if k[0] != 2} for e in experts_of(backbone)])
    ours = backbone(images, route=lambda x: [all_act, all_act, none])
    torch.testing.assert_close(ours, below(images), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(ours, backbone(images))
    torch.testing.assert_close(backbone(images, route=fixed(none)), plain(images), rtol=1e-12, atol=1e-12)


def test_ragged_ranks_growth_and_freezing():
    backbone = with_experts(["qkv"], layers=[1])
    before, slot = backbone(IMAGES), backbone.slots["1"]
    slot.add(Bundle({"qkv": LoRA(16, 48, 5)}))
    torch.testing.assert_close(backbone(IMAGES), before, rtol=0, atol=1e-6)  # a new expert adds 0
    slot.adapters[0].requires_grad_(False)
    backbone(IMAGES).sum().backward()
    assert slot.adapters[0]["qkv"].up.grad is None and slot.adapters[1]["qkv"].up.grad.any()
    assert slot.ranks() == [2, 5]


def test_a_deep_copy_has_experts_of_its_own():
    backbone = with_experts()
    before = backbone(IMAGES)
    twin = copy.deepcopy(backbone)
    torch.nn.init.zeros_(routed.loras_of(twin, 0)[0, "qkv"].up)
    assert torch.equal(backbone(IMAGES), before) and not torch.equal(twin(IMAGES), before)
    twin.slots.clear()
    assert torch.equal(twin(IMAGES), toy_backbone()(IMAGES)) and torch.equal(backbone(IMAGES), before)


def test_a_checkpoint_holds_the_experts_and_not_the_vit(toy_learner):
    keys = {
        "lora_target": ["proj"],
        "num_experts": 2,
        "grow_experts": False,
        "adapt_start_layer": 1,
        "use_moe_routing": False,
    }
    learner = toy_learner("dylora_moe", **keys)
    names = [n for n in Learner.own_state(learner) if n.startswith("backbone.")]
    parts = [f"adapters.{e}.loras.proj.{p}" for e in (0, 1) for p in ("down", "up")]
    assert names == [f"backbone.slots.{layer}.{part}" for layer in (1, 2) for part in parts]
    again = toy_learner("dylora_moe", **keys | {"num_experts": 1, "adapt_start_layer": 2}, backbone=toy_backbone())
    ours, theirs = (routed.loras_of(each.backbone, 0)[2, "proj"].down for each in (learner, again))
    assert torch.equal(ours, theirs)  # start values come from the name alone


def test_lower_precision_passes_with_gates():
    backbone = with_experts(experts=2).to(torch.bfloat16)
    assert backbone(IMAGES, route=fixed(torch.rand(3, 2))).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: bundle(b, 0, ["pro"], 2), "'pro' is unknown, qkv, proj, fc1, fc2 are known; did you mean 'proj'"),
        (lambda b: bundle(b, 3, ["qkv"], 2), r"layer 3 does not exist, the backbone has layers 0\.\.2"),
        (lambda b: bundle(b, -1, ["qkv"], 2), r"layer -1 does not exist, the backbone has layers 0\.\.2"),
        (lambda b: bundle(b, 0, [], 2), "some of qkv, proj, fc1, fc2; got none"),
        (lambda b: bundle(b, 0, ["qkv"], 0), "rank of at least 1, got 0"),
        (lambda b: Bundle({"kv": LoRA(4, 4, 1)}), r"some of qkv, proj, fc1, fc2; got \['kv'\]"),
        (lambda b: routed.loras_of(b, 0), "the backbone has no LoRA experts"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(toy_backbone())


def test_experts_on_other_layers_and_gates_of_other_experts_are_refused():
    backbone = with_experts(["qkv", "fc1"], experts=2)
    with pytest.raises(ValueError, match="the experts here are on qkv, fc1, the new one on qkv"):
        backbone.slots["0"].add(bundle(backbone, 0, ["qkv"], 2))
    assert len(backbone.slots["0"]) == 2
    for expert in (2, -1):
        with pytest.raises(ValueError, match=f"expert {expert} does not exist, there are 2 in each layer"):
            routed.loras_of(backbone, expert)
    for shape in ((3, 4), (4, 2)):
        with pytest.raises(ValueError, match=rf"gates of shape \[{shape[0]}, {shape[1]}\] do not fit"):
            backbone(IMAGES, route=fixed(torch.ones(shape)))


# Against peft -------------------------------------------------------------------------------------------------------


def same(ours, theirs):
    """Features are of unit size (the ViT's last norm), so 1e-6 of that and of the value is float32's own rounding."""
    tolerance = 1e-6 if ours.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def modules_of(expert):
    return {place: f"blocks.{place[0]}.{TARGETS[place[1]]}" for place in expert}


def peft_twin(peft, backbone):
    """peft's model on a copy of the same ViT, an adapter "e0", "e1", .. for each expert, all with our weights."""
    experts = experts_of(backbone)
    names, first = modules_of(experts[0]), [next(iter(expert.values())) for expert in experts]
    configs = [peft.LoraConfig(r=e.rank, lora_alpha=e.alpha, target_modules=list(names.values())) for e in first]
    plain = toy_backbone().vit.to(first[0].down.dtype)
    model = peft.get_peft_model(plain, configs[0], adapter_name="e0")
    for index, config in enumerate(configs[1:], start=1):
        model.add_adapter(f"e{index}", config)
    with torch.no_grad():
        for place, name in names.items():
            theirs = model.base_model.model.get_submodule(name)
            for index, expert in enumerate(experts):
                theirs.lora_A[f"e{index}"].weight.copy_(expert[place].down)
                theirs.lora_B[f"e{index}"].weight.copy_(expert[place].up)
    return model.eval()


@pytest.mark.parametrize("targets", [ALL, ["qkv"], ["proj"], ["fc1"], ["fc2"]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_expert_equals_peft(peft, targets, dtype):
    backbone = with_experts(targets, rank=3, alpha=4).to(dtype)
    model = peft_twin(peft, backbone)
    ours, theirs = backbone(IMAGES), model(IMAGES.to(dtype))
    assert ours.dtype == dtype and (ours - toy_backbone()(IMAGES)).abs().max() > 0.01
    same(ours, theirs)
    routed.attach_router(backbone, "shared")  # of one expert: gate 1
    same(backbone(IMAGES), theirs)


def test_one_experts_gradients_equal_pefts(peft):
    backbone = with_experts(rank=3, alpha=4).double()
    model = peft_twin(peft, backbone)
    backbone(IMAGES).square().sum().backward()
    model(IMAGES.double()).square().sum().backward()
    (expert,) = experts_of(backbone)
    for place, name in modules_of(expert).items():
        theirs, ours = model.base_model.model.get_submodule(name), expert[place]
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
    ours = backbone(IMAGES, route=fixed(gates if per == "sample" else gates.unsqueeze(1).expand(3, 5, 3)))
    for index, weights in enumerate(gates.tolist()):
        model.add_weighted_adapter(["e0", "e1", "e2"], weights, f"mix{index}", combination_type="cat")
        model.set_adapter(f"mix{index}")
        same(ours[index : index + 1], model(IMAGES[index : index + 1]))


def test_gates_of_each_token_weigh_pefts_adapters_in_every_linear_layer(peft):
    backbone = with_experts(experts=3, alpha=1).double()
    model, names = peft_twin(peft, backbone), modules_of(experts_of(backbone)[0])
    gates = torch.rand(3, 5, 3, dtype=torch.float64)
    for place, (_, x, out) in watched(backbone, gates).items():
        theirs = model.base_model.model.get_submodule(names[place])
        wanted = plain = theirs.base_layer(x)
        for e in range(3):
            model.set_adapter(f"e{e}")
            wanted = wanted + gates[..., e : e + 1] * (theirs(x) - plain)
        same(out, wanted)


# peft's files -------------------------------------------------------------------------------------------------------


def taken(backbone, weights):
    experts = experts_of(backbone)
    return {place: merge([expert[place] for expert in experts], weights) for place in experts[0]}


def imported(folder):
    backbone = toy_backbone()
    return fill(backbone, [load_peft(folder, backbone)])


def same_function(folder, reference):
    same(imported(folder)(IMAGES), reference)


def quiet_load(peft, folder):
    return peft.PeftModel.from_pretrained(toy_backbone().vit, str(folder)).eval()


@pytest.mark.parametrize("weights", [(0, 1, 0), (0.5, 1, 0.25)], ids=["one expert", "consolidated"])
def test_peft_loads_what_we_export(peft, tmp_path, weights, recwarn):
    backbone = with_experts(experts=3, alpha=3)
    save_peft(tmp_path, taken(backbone, weights), "toy")
    ours = backbone(IMAGES, route=fixed(torch.tensor([weights], dtype=torch.float32).expand(3, 3)))
    same(quiet_load(peft, tmp_path)(IMAGES), ours)
    assert not [w for w in recwarn if "missing" in str(w.message)]
    same_function(tmp_path, ours)


def test_ranks_and_alphas_by_layer_survive_both_ways(peft, tmp_path):
    backbone, expert = toy_backbone(), {}
    for index, place in enumerate([(0, "qkv"), (0, "fc2"), (1, "proj"), (2, "proj")]):
        linear = linear_of(backbone, *place)
        expert[place] = LoRA(linear.in_features, linear.out_features, 2 + index % 3, 1.5 + index)
    stirred(fill(backbone, [expert]))
    assert [slot.ranks() for slot in routed.routed_layers(backbone)] == [[3], [4], [2]]
    ours = backbone(IMAGES)
    save_peft(tmp_path / "ours", taken(backbone, [1]))
    model = quiet_load(peft, tmp_path / "ours")
    same(model(IMAGES), ours)
    model.save_pretrained(tmp_path / "theirs")
    same_function(tmp_path / "theirs", ours)
    found = load_peft(tmp_path / "theirs", toy_backbone())
    assert {place: (lora.rank, lora.alpha) for place, lora in found.items()} == {
        place: (lora.rank, lora.alpha) for place, lora in expert.items()
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
    (expert,) = experts_of(backbone)
    assert set(back) == set(expert)
    for place, lora in back.items():
        ours = expert[place]
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


# Experts on several layers ----------------------------------------------------------------------------------------------


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


def test_a_bundle_of_several_ranks_acts_and_merges_as_its_parts():
    made = [Bundle(dict(zip(("qkv", "proj"), some_loras(ranks), strict=True))) for ranks in ((1, 2), (3, 2))]
    whole, x = merge_bundles(made, [1.0, 0.5]), torch.randn(2, 5, 4, dtype=torch.float64)
    assert [one.rank for one in made] == [2, 3] and (whole["qkv"].rank, whole["proj"].rank) == (4, 4)
    for target in ("qkv", "proj"):
        assert (whole[target](x) - made[0][target](x) - 0.5 * made[1][target](x)).abs().max() < 1e-12
