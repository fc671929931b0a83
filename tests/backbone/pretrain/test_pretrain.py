"""The pre-training learns, goes on exactly where it stopped, and exports the same function at unit stream size."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from backbone import weights
from backbone.pretrain import __main__ as pretrain
from backbone.pretrain import export
from backbone.vit import SlottedViT
from utils.config.schema import Experiment
from utils.data.views import Views, ViewSource

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="pre-training needs torch 2.9")
VIEWS = Views(sign_families=4, sign_siblings=2, fractal_families=2, fractal_siblings=2, easy_steps=0)
TINY = pretrain.Settings(
    steps=6,
    batch_size=16,
    warmup=0.2,
    bf16=False,
    views=VIEWS,
    architecture={**pretrain.ARCHITECTURE, "embed_dim": 32, "depth": 3, "num_heads": 2},
)


def train(run: pretrain.Run, until: int) -> list[float]:
    """Losses of the steps from where `run` stands to step `until`."""
    source = ViewSource(run.settings.views, run.settings.batch_size)
    return [run.train_step(*source.batch(run.step))[0] for _ in range(run.step, until)]


def same(a: pretrain.Run, b: pretrain.Run) -> bool:
    pairs = [(a.model.state_dict(), b.model.state_dict()), (a.average, b.average)]
    return a.step == b.step and all(torch.equal(x[name], y[name]) for x, y in pairs for name in x)


@pytest.fixture(scope="module")
def whole():
    """Trained without interruption."""
    run = pretrain.Run(TINY)
    train(run, 6)
    return run


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(ViewSource(VIEWS, 64).batch(99)[0])


def averaged(run: pretrain.Run) -> dict[str, torch.Tensor]:
    return {name: value for name, value in run.average.items() if not name.startswith("head.")}


def slotted(state: dict[str, torch.Tensor]) -> SlottedViT:
    vit = VisionTransformer(**TINY.architecture)
    vit.load_state_dict(state)
    return SlottedViT(vit, export.MEAN, export.STD)


def test_a_few_steps_lower_the_loss():
    easy = replace(VIEWS, easy_steps=10**6)
    run = pretrain.Run(replace(TINY, steps=60, batch_size=32, lr=2e-2, adamw_lr=1e-2, label_smoothing=0.0, views=easy))
    losses = train(run, 60)
    assert losses[0] == pytest.approx(math.log(12), abs=0.1)  # twelve classes, a head near zero
    assert sum(losses[-5:]) / 5 < 0.65 * losses[0]


def test_the_rate_warms_up_and_falls_to_nothing():
    run = pretrain.Run(replace(TINY, steps=10))
    source = ViewSource(VIEWS, 16)
    rates = []
    for step in range(10):
        run.train_step(*source.batch(step))
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in run.optimizers])
    muon = [rate for rate, _ in rates]
    assert muon[0] < 0.01 * TINY.lr and max(muon[2:5]) > 0.75 * TINY.lr and muon[-1] < 0.05 * TINY.lr
    assert all(adamw == pytest.approx(rate * TINY.adamw_lr / TINY.lr) for rate, adamw in rates)


def test_every_parameter_is_trained_by_exactly_one_optimizer(whole):
    muon, adamw = ([id(p) for group in o.param_groups for p in group["params"]] for o in whole.optimizers)
    assert sorted(muon + adamw) == sorted(id(p) for p in whole.model.parameters())
    names = {id(p): name for name, p in whole.model.named_parameters()}
    assert {names[i] for i in muon} == {
        n for n in names.values() if n.startswith("blocks.") and n.endswith("weight") and "norm" not in n
    }


def test_a_resumed_run_gives_the_same_weights(whole, tmp_path):
    first = pretrain.Run(TINY)
    train(first, 3)
    pretrain.save_checkpoint(first, tmp_path / "half.pt")
    second = pretrain.Run(TINY)
    second.load(pretrain.read_checkpoint(tmp_path / "half.pt"))
    assert not same(second, whole)
    train(second, 6)
    assert same(second, whole)


def test_the_command_resumes_with_its_rendering_process_and_exports(whole, tmp_path, monkeypatch):
    first = pretrain.Run(TINY)
    train(first, 3)
    pretrain.save_checkpoint(first, tmp_path / "half.pt")
    assert same(pretrain.pretrain(TINY, tmp_path / "half.pt", resume=True), whole)
    out = tmp_path / "öut.safetensors"
    command = [
        "pretrain",
        "--export-only",
        "--checkpoint",
        str(tmp_path / "half.pt"),
        "--out",
        str(out),
        "--threads",
        "1",
    ]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pretrain.main()
    assert set(load_file(out)) == set(averaged(whole))


def test_checkpoints_of_other_settings_and_missing_ones_are_refused(whole, tmp_path):
    other = pretrain.Run(replace(TINY, batch_size=8, steps=3))
    with pytest.raises(ValueError, match="another batch_size;"):
        other.load(whole.state())
    with pytest.raises(ValueError, match=r"no checkpoint .*nöwhere\.pt"):
        pretrain.read_checkpoint(tmp_path / "nöwhere.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match=r"cut\.pt is damaged"):
        pretrain.read_checkpoint(tmp_path / "cut.pt")


@pytest.mark.parametrize(
    "options", [["--minutes", "0"], ["--threads", "0"], ["--export-only", "--checkpoint", "none.pt"]]
)
def test_a_mistake_on_the_command_line_is_answered_without_a_traceback(options, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pretrain", *options])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(SystemExit) as stopped:
        pretrain.main()
    assert stopped.value.code == 2 and "error: " in capsys.readouterr().err


def test_rescaling_keeps_the_function_and_sets_the_stream_to_unit_size(whole, images):
    before = {
        name: value * 8 if any(w in name for w in export.STREAM_WRITERS) else value
        for name, value in averaged(whole).items()
    }
    assert export.stream_scale(before, TINY.architecture, images) > 2
    after = export.rescale_stream(before, TINY.architecture, images)
    assert export.stream_scale(after, TINY.architecture, images) == pytest.approx(1, abs=1e-4)
    expected, got = slotted(before)(images.float() / 255), slotted(after)(images.float() / 255)
    assert ((got - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-4
    means = slotted(after).encode(images.float() / 255, tap=[1])[1][
        1
    ]  # of three blocks, what the second one's slot reads
    assert means.square().mean().sqrt() == pytest.approx(1, abs=1e-4)


def test_everything_that_writes_to_the_stream_is_rescaled(whole, images):
    """Each block's addition and the embedding shrink by one factor; what is left out would change the function."""
    state = averaged(whole)
    after = export.rescale_stream(state, TINY.architecture, images)
    factor = 1 / export.stream_scale(state, TINY.architecture, images)
    old, new = slotted(state), slotted(after)
    x = images.float() / 255
    assert torch.allclose(new.stem(x), factor * old.stem(x), atol=1e-5)
    olds, news = (model.encode(x, tap=range(3))[1] for model in (old, new))
    assert all(torch.allclose(news[k], factor * olds[k], rtol=1e-3, atol=1e-4) for k in range(3))
    changed = {name for name in state if not torch.equal(state[name], after[name])}
    assert {n.split(".", 2)[-1] if n.startswith("blocks") else n for n in changed} == {
        "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
        "attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias",
    }  # fmt: skip


def test_an_exported_file_loads_strictly_and_computes_what_was_trained(whole, images, tmp_path, monkeypatch):
    path = tmp_path / "embedded.safetensors"
    export.export(whole.state(), path, images)
    monkeypatch.setattr(weights, "EMBEDDED_FILE", path)
    built, facts = weights.build(experiment())
    assert facts.mean == export.MEAN and facts.std == export.STD and facts.image_size == 32
    expected = slotted(averaged(whole))(images.float() / 255)
    got = built(images.float() / 255)
    assert ((got - expected).norm(dim=1) / expected.norm(dim=1)).max() < 3e-3  # fp16: 11 bits a weight


def test_the_shipped_weights_are_small_of_unit_stream_and_say_how_they_were_made():
    assert pretrain.EMBEDDED == weights.EMBEDDED_FILE and pretrain.EMBEDDED.stat().st_size <= 6_000_000
    with weights.safe_open(pretrain.EMBEDDED, framework="pt") as file:
        facts = file.metadata()
    assert json.loads(facts["architecture"]) == pretrain.ARCHITECTURE
    assert f"{int(facts['views']):,} views" in facts["about"]
    state = {name: value.float() for name, value in load_file(pretrain.EMBEDDED).items()}
    images = torch.from_numpy(ViewSource(Views(), 512).batch(2**31 + 1)[0])
    assert export.stream_scale(state, pretrain.ARCHITECTURE, images) == pytest.approx(1, abs=0.05)


def test_training_sees_the_same_numbers_as_the_frozen_backbone(images):
    model = SlottedViT(VisionTransformer(**TINY.architecture), export.MEAN, export.STD)
    assert torch.allclose(export.to_input(images), (images.float() / 255 - model.mean) / model.std, atol=1e-6)


def experiment() -> Experiment:
    return Experiment.model_validate({"model_name": "simplecil", "dataset": "digits", "init_cls": 2, "increment": 2})
