"""An expert of a saved run as peft's files: peft computes with it what the run's expert adds, and bad calls say why."""

import copy
import json
import shutil

import pytest
import torch

from backbone import weights
from backbone.adapters.peft_format import CONFIG, WEIGHTS, load_peft, save_peft
from backbone.experts import routed
from commands import export_peft, saved
from tests.helpers.runs import few_digits, tiny_run
from utils import data

# a rate and steps that take the experts well away from their start
LORA = {"lora_target": ["qkv", "fc2"], "grow_experts": False, "num_experts": 3, "init_lr": 1.0, "batch_size": 8}
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs of two tasks: with LoRA experts, with adapters as experts, and of a method without experts."""
    kinds = {"lora": ("dylora_moe", LORA), "adapters": ("dylora_moe", {}), "finetune": ("finetune", {})}
    with pytest.MonkeyPatch.context() as patch:
        return {k: tiny_run(m, tmp_path_factory.mktemp(k), patch, **keys)[0] for k, (m, keys) in kinds.items()}


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    dataset = few_digits()
    monkeypatch.setattr(data, "load", lambda *args, **options: dataset)
    return shutil.copytree(finished["lora"], tmp_path / "seed_3")


def by_peft(out, learner):
    """Features of IMAGES from peft's model of the run's plain ViT with the adapter in `out`, in float64.

    peft sums in another order than the run does: in float32 the two would differ by rounding of unknown size.
    """
    peft = pytest.importorskip("peft", reason="the peft library is not installed (pip install -r requirements-dev.txt)")
    plain = weights.build(learner.cfg)[0].double()
    images = (IMAGES - plain.mean) / plain.std if plain.normalises else IMAGES
    with torch.no_grad():
        before = plain(IMAGES)
        after = peft.PeftModel.from_pretrained(plain.vit, str(out)).double().eval()(images.double())
    assert (after - before).abs().max() > 0.01
    return after


def alone(learner, index, count):
    """Features of IMAGES with one expert of the run at gate 1, in float64."""
    gates = torch.eye(count, dtype=torch.float64)[index].expand(len(IMAGES), count)
    with torch.no_grad():
        return copy.deepcopy(learner.backbone).double()(
            IMAGES, route=lambda x: [gates] * len(routed.routed_layers(learner.backbone))
        )


@pytest.mark.parametrize("expert", [0, 2])
def test_peft_computes_what_the_runs_expert_does(folder, tmp_path, capsys, expert):
    assert export_peft.main([str(folder), str(expert), str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert f"out: expert {expert} after task 2, on qkv, fc2 of layers" in told and told.count("\n") == 1
    learner = saved.load(folder).learner
    wanted = alone(learner, expert, 3)
    torch.testing.assert_close(by_peft(tmp_path / "out", learner), wanted, rtol=1e-6, atol=1e-6)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["base_model_name_or_path"] == "embedded"


def test_a_merged_expert_goes_both_ways(folder, tmp_path):
    learner = saved.load(folder).learner
    gates = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.4, 0.4], [0.3, 0.1, 0.6]])
    given = [row.double().expand(len(IMAGES), 3) for row in gates * torch.tensor([1.0, 0.0, 1.0]) / gates[:, 2:]]
    with torch.no_grad():
        wanted = copy.deepcopy(learner.backbone).double()(IMAGES, route=lambda x: given)  # f_2 + (g_0 / g_2) f_0
    routed.merge_experts(learner.backbone, 0, 2, gates)
    loras = routed.loras_of(learner.backbone, 1)
    assert {lora.rank for lora in loras.values()} == {2 * learner.cfg.ffn_num}
    save_peft(tmp_path / "out", loras)
    torch.testing.assert_close(
        by_peft(tmp_path / "out", learner), wanted, rtol=1e-6, atol=1e-6
    )  # weights merged in float32
    back = load_peft(tmp_path / "out", learner.backbone)
    assert back.keys() == loras.keys()
    for place, lora in back.items():
        assert torch.equal(lora.down, loras[place].down) and torch.equal(lora.up, loras[place].up)
        assert lora.scale == loras[place].scale


def test_experts_are_asked_for_by_their_lasting_number(folder, tmp_path, capsys):
    """As rows and pictures of the run name them, and not by their place after others were merged away."""
    path, learner = folder / "metrics.jsonl", saved.load(folder).learner
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    gates = [row for row in rows if row["kind"] == "gates"]
    assert [row["experts"] for row in gates] == [[0, 1, 2]] * 2
    gates[1]["experts"] = [1, 2, 5]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert export_peft.main([str(folder), "2", str(tmp_path / "out")]) == 0
    found = load_peft(tmp_path / "out", learner.backbone)
    assert all(torch.equal(found[place].up, lora.up) for place, lora in routed.loras_of(learner.backbone, 1).items())
    capsys.readouterr()
    assert export_peft.main([str(folder), "0", str(tmp_path / "other")]) == 2
    assert f"expert 0 does not exist after task 2 of {folder}, there are: 1, 2, 5\n" in capsys.readouterr().err
    path.write_text("")
    assert export_peft.main([str(folder), "2", str(tmp_path / "other")]) == 2
    assert "metrics.jsonl has no `gates` row of task 2" in capsys.readouterr().err


def test_without_a_router_experts_are_counted_from_zero(tmp_path, monkeypatch):
    folder, learner = tiny_run("dylora_moe", tmp_path, monkeypatch, **LORA | {"use_moe_routing": False})
    assert export_peft.main([str(folder), "1", str(tmp_path / "out")]) == 0
    found = load_peft(tmp_path / "out", learner.backbone)
    assert all(torch.equal(found[place].up, lora.up) for place, lora in routed.loras_of(learner.backbone, 1).items())


@pytest.mark.parametrize(
    ("kind", "method"), [("adapters", "dylora_moe"), ("finetune", "finetune")], ids=["adapters", "another method"]
)
def test_a_run_without_lora_experts_is_refused(finished, folder, tmp_path, capsys, kind, method):
    assert export_peft.main([str(finished[kind]), "0", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert f"is a run of {method} without LoRA experts; dylora_moe has them if lora_target is set" in told
    assert told.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("run", "expert", "out", "message"),
    [
        ("seed_4", "0", "out", "seed_4 is no run folder: it has no config.json"),
        ("seed_3", "3", "out", "expert 3 does not exist after task 2 of"),
        ("seed_3", "-1", "out", "there are: 0, 1, 2"),
        ("seed_3", "0", "seed_3", "seed_3 exists and is not an empty folder"),
        ("seed_3", "0", "seed_3/config.json", "config.json exists and is not an empty folder"),
    ],
)
def test_bad_calls_are_refused_in_a_line_and_write_nothing(folder, tmp_path, capsys, run, expert, out, message):
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert export_peft.main([str(tmp_path / run), expert, str(tmp_path / out)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_an_empty_folder_is_written_into(folder, tmp_path):
    (tmp_path / "out").mkdir()
    assert export_peft.main([str(folder), "1", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [CONFIG, WEIGHTS]
