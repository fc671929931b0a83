"""bf16 is in the backbone's matrix products and nowhere else, for every method, and a bf16 run is as whole as any other."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import main
import models
from backbone import precision as computing
from backbone.adapters.adapter import Adapter
from backbone.prefix_cache import GIB, PrefixCache
from commands import export, saved
from tests.helpers.methods import METHODS
from tests.helpers.methods import run as learn_all
from tests.helpers.runs import assert_same_run, stopped_again_and_again, tiny_experiment
from tests.helpers.toy import toy_backbone, toy_stream
from utils.config.strict_json import read_json
from utils.files import storage

IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def adapted(precision="fp32", **other):
    """A toy backbone with an adapter that adds something in its last two layers."""
    backbone = toy_backbone(**other)
    for layer in (1, 2):
        backbone.fill(layer, Adapter(16, 4))
        for parameter in backbone.slots[str(layer)].parameters():
            nn.init.normal_(parameter, std=0.3)
    computing.prepare(backbone, precision)
    return backbone.eval()


def in_bf16(x):
    """Whether every number could have come out of a bf16 product as it is."""
    return bool((x == x.bfloat16().to(x.dtype)).all())


@torch.no_grad()
def test_products_are_bf16_and_what_passes_on_is_float32():
    torch.manual_seed(0)
    plain = adapted()
    torch.manual_seed(0)
    backbone = adapted("bf16")
    seen = []
    vit = backbone.vit
    linears = [m for m in [*vit.modules(), *backbone.slots.modules()] if isinstance(m, nn.Linear | nn.Conv2d)]
    for module in linears:
        module.register_forward_hook(lambda m, i, o: seen.append((m.weight.dtype, o.dtype)))
    features, means = backbone.encode(IMAGES, tap=(0, 1, 2))
    assert len(seen) == len(linears) and set(seen) == {(torch.float32, torch.bfloat16)}
    assert features.dtype == torch.float32 and {m.dtype for m in means.values()} == {torch.float32}
    assert not in_bf16(means[2])  # summed and kept in float32, not rounded on the way
    gap = (features - plain(IMAGES)).abs().max()
    assert 0 < gap < 0.1  # features are about 1
    assert backbone.stem(IMAGES).dtype == backbone.prefix(IMAGES, 1).x.dtype == torch.float32


@pytest.mark.parametrize("other", [{"pos_embed": "none", "class_token": False, "global_pool": "avg"},
                                   {"global_pool": "map", "class_token": False}])  # fmt: skip
@torch.no_grad()
def test_models_that_end_or_begin_in_a_product_keep_the_stream_in_float32(other):
    backbone = adapted("bf16", **other)
    features, means = backbone.encode(IMAGES, tap=(0,))
    assert features.dtype == means[0].dtype == backbone.prefix(IMAGES, 0).x.dtype == torch.float32


@torch.no_grad()
def test_float64_and_fp32_are_as_they_were():
    double = adapted().double()
    wanted = double(IMAGES)
    computing.prepare(double, "bf16")
    assert torch.equal(double(IMAGES), wanted)  # autocast leaves float64 alone
    plain = adapted()
    before = plain(IMAGES)
    computing.prepare(plain, "bf16")
    assert not torch.equal(plain(IMAGES), before)
    computing.prepare(plain, "fp32")
    assert torch.equal(plain(IMAGES), before)


def test_tf32_is_told_where_it_does_not_act():
    told = []
    backbone = toy_backbone()
    computing.prepare(backbone, "tf32", say=told.append)
    assert told == ["precision tf32 has no effect on cpu, only on CUDA GPUs: the run is in fp32"]
    assert torch.equal(backbone(IMAGES), toy_backbone()(IMAGES))
    computing.prepare(backbone.to("meta"), "tf32", say=told.append)  # a look at shapes
    assert len(told) == 1


@torch.no_grad()
def test_what_the_cache_keeps_is_of_the_precision():
    data = toy_stream().test(0)
    torch.manual_seed(0)
    backbone = adapted()
    cache = PrefixCache(backbone, "memory", GIB)
    images = next(iter(data.batches(8, augment=False, shuffle=False)))[0]
    kept = {}
    for precision in ("fp32", "bf16"):
        computing.prepare(backbone, precision)
        kept[precision] = next(iter(cache.batches(data, 8, 1, augment=False, shuffle=False)))[0]
        whole = backbone.prefix(images, 1, inside=True)
        assert kept[precision].x.dtype == kept[precision].after.dtype == torch.float32
        step = 2.0**-8 if precision == "bf16" else 2.0**-17  # groups of a class round otherwise than a batch of eight
        torch.testing.assert_close(kept[precision].after, whole.after, rtol=step, atol=4 * step)
    assert not torch.equal(kept["fp32"].x, kept["bf16"].x)  # another precision, another key


# ---------------------------------------------------------------- every method


@pytest.mark.parametrize("method", METHODS)
def test_weights_losses_routers_and_statistics_stay_in_float32_or_better(method, toy_learner, monkeypatch):
    head = "linear" if models.settings_of(method).model_fields["head"].default == "linear" else "ncm"
    learner = toy_learner(method, precision="bf16", head=head)
    casts, losses, gates = [], [], []
    autocast, softmax, entropy = torch.autocast.__enter__, torch.Tensor.softmax, F.cross_entropy

    def entered(self):
        casts.append((self.fast_dtype, self._enabled))
        return autocast(self)

    def chosen(self, *args, **options):
        gates.append((self.dtype, in_bf16(self) and bool(self.any())))
        return softmax(self, *args, **options)

    def lost(scores, *args, **options):
        assert not torch.is_autocast_enabled("cpu")
        losses.append(scores.dtype)
        return entropy(scores, *args, **options)

    monkeypatch.setattr(torch.autocast, "__enter__", entered)
    monkeypatch.setattr(torch.Tensor, "softmax", chosen)
    monkeypatch.setattr(F, "cross_entropy", lost)
    learn_all(learner, toy_stream())
    assert (torch.bfloat16, True) in casts
    assert set(losses) <= {torch.float32} and (losses or method == "simplecil")
    assert {dtype for dtype, _ in gates} <= {torch.float32}
    assert not any(rounded for _, rounded in gates)
    if learner.routed_layers() or method == "sema":
        assert gates
    assert {t.dtype for t in learner.state_dict().values() if t.is_floating_point()} <= {torch.float32, torch.float64}
    assert all(torch.isfinite(t).all() for t in learner.state_dict().values())
    if learner.statistics is not None:
        assert {t.dtype for t in learner.statistics.state_dict().values()} == {torch.float64}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Function: the arguments of a tiny bf16 run of a method, and the folder of the finished run."""

    def build(method, **settings):
        settings = {"precision": "bf16"} | settings
        run, out = tiny_experiment(method, tmp_path, monkeypatch, **settings), tmp_path / settings["precision"]
        assert main.main([*run, "--out", str(out)]) == 0
        (folder,) = out.glob("*/*/seed_3")
        return run, folder

    return build


@pytest.mark.parametrize("method", METHODS)
def test_a_bf16_run_comes_back_bit_for_bit_and_is_exported_as_it_is(method, tiny, tmp_path, capsys):
    _, folder = tiny(method)
    assert main.main(["--evaluate", str(folder)]) == 0
    assert "every number is as recorded" in capsys.readouterr().out
    learner = saved.load(folder).learner
    assert main.main(["--export", str(folder)]) == 0
    again, _ = export.load(folder / "export")
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        scores = learner.logits(images)
        assert torch.equal(again.logits(images), scores)
        again.backbone.precision = "fp32"
        assert not torch.equal(again.logits(images), scores)


@pytest.mark.slow
def test_a_stopped_bf16_run_ends_the_same(tiny, tmp_path, monkeypatch, capsys):
    run, reference = tiny("sema", epochs=2, func_epoch=2, rd_epoch=2)
    code, stops = stopped_again_and_again(run, tmp_path / "cut", monkeypatch)
    assert code == 0 and stops > 2
    (folder,) = (tmp_path / "cut").glob("*/*/seed_3")
    assert_same_run(folder, reference)
    states = [storage.read_state(at / "checkpoints" / "task_00001.json")[1] for at in (folder, reference)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("method", ["simplecil", "sema", "dylora_moe"])
def test_bf16_costs_no_accuracy(method, tiny):
    """On the embedded backbone, where the methods learn; 40 test images, of which two may fall otherwise."""
    better = {"backbone_weights": "pretrained", "image_size": 32, "batch_size": 8, "head": "ncm"}
    found = {p: tiny(method, precision=p, **better)[1] for p in ("fp32", "bf16")}
    assert found["fp32"].parent.name != found["bf16"].parent.name  # hashed
    accuracy = {p: read_json(folder / "results.json")[0]["last_accuracy"] for p, folder in found.items()}
    assert accuracy["fp32"] > 80 and abs(accuracy["fp32"] - accuracy["bf16"]) <= 5
