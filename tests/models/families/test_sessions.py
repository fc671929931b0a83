"""APER, RanPAC and EASE as learners: what trains when, what predicts, what their keys do, and their originals' files."""

import itertools
import json

import pytest
import torch

import main
from backbone.heads.heads import RIDGES
from backbone.heads.subspaces import PLAIN, features_in
from tests.helpers.methods import images_of, run
from tests.helpers.recorded import watch_fit
from tests.helpers.toy import toy_backbone, toy_dataset, toy_stream

FRESH = {"ffn_adapter_dropout": 0.0, "ffn_num": 3}
PILOT = {
    "prefix": "reproduce", "dataset": "cifar224", "memory_size": 0, "memory_per_class": 0, "fixed_memory": False,
    "shuffle": True, "init_cls": 10, "increment": 10, "device": ["0"], "seed": [1993], "init_lr": 0.01, "batch_size": 48,
    "weight_decay": 0.0005, "min_lr": 0, "ffn_num": 64, "optimizer": "sgd", "vpt_type": "shallow", "prompt_token_num": 5,
}  # fmt: skip
FILES = {
    "aper_adapter": {"backbone_type": "pretrained_vit_b16_224_adapter", "tuned_epoch": 20},
    "ranpac": {"backbone_type": "pretrained_vit_b16_224_adapter", "tuned_epoch": 20, "use_simplecil": False,
               "use_RP": True, "M": 10000},
    "ease": {"backbone_type": "vit_base_patch16_224_ease", "init_epochs": 20, "later_epochs": 20, "later_lr": 0.025,
             "init_lr": 0.025, "scheduler": "cosine", "pretrained": True, "use_diagonal": False, "recalc_sim": True,
             "alpha": 0.1, "use_init_ptm": False, "beta": 0, "use_old_data": False, "use_reweight": True,
             "moni_adam": False, "adapter_num": -1},
}  # fmt: skip


@pytest.fixture
def sessions(monkeypatch):
    """(epochs, rate, names of what is trained) of each training session."""
    found = []

    def watched(real, learner, task, step, parameters, **options):
        ours = {id(p) for p in parameters}
        names = [name for name, p in learner.named_parameters() if id(p) in ours]
        found.append((options["epochs"], options["lr"], names))
        return real(learner, task, step, parameters, **options)

    watch_fit(monkeypatch, watched)
    return found


def adapters_of(learner):
    return {k: v.clone() for k, v in learner.own_state().items() if k.startswith("backbone.slots")}


@pytest.mark.parametrize("method", FILES)
def test_its_originals_file_loads(method, tmp_path, capsys):
    path = tmp_path / "pilot.json"
    path.write_text(json.dumps(PILOT | {"model_name": method} | FILES[method]))
    more = ["--data-root", str(tmp_path), "--device", "cpu"]  # the originals ask for the first GPU
    assert main.main(["--config", str(path), "--check", *more]) == 0
    assert "the settings are valid" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["aper_adapter", "ranpac"])
def test_the_first_task_alone_is_trained(method, toy_learner, sessions):
    stream, learner = toy_stream(), toy_learner(method, **FRESH)
    run(learner, stream, tasks=1)
    before = adapters_of(learner)
    run(learner, stream)
    names = ["local_head.weight", "local_head.sigma"]
    assert len(sessions) == 2 and sessions[0][2] == [*before, *names]  # `run` starts again with the first task
    after = adapters_of(learner)
    learner.begin_task()
    learner.learn(stream.task(2))
    learner.consolidate(stream.task(2))
    assert all(torch.equal(after[k], v) for k, v in adapters_of(learner).items())
    assert not learner.trained and learner.images_shown == 20
    assert not [name for name, _ in learner.named_parameters() if "head" in name]


def test_aper_features_are_the_plain_and_the_adapted_ones(toy_learner):
    learner = run(toy_learner("aper_adapter", **FRESH, init_lr=1.0), toy_stream(), tasks=1).double()
    images = images_of(toy_stream()).double()
    with torch.no_grad():
        plain, adapted = learner.features(images).chunk(2, dim=1)
        torch.testing.assert_close(plain, toy_backbone().double().eval()(images), rtol=0, atol=1e-12)
        torch.testing.assert_close(adapted, learner.backbone(images), rtol=0, atol=1e-12)
        assert (plain - adapted).abs().max() > 1e-4


def test_without_a_session_aper_scores_as_simplecil(toy_learner):
    images = images_of(toy_stream())
    ours = run(toy_learner("aper_adapter", **FRESH, tuned_epoch=0), toy_stream())
    theirs = run(toy_learner("simplecil"), toy_stream())
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(images), theirs.logits(images), rtol=0, atol=1e-6)


def test_ranpac_is_ridge_of_lifted_features_over_all_tasks(toy_learner):
    stream = toy_stream()
    learner = run(toy_learner("ranpac", **FRESH, backbone=toy_backbone().double()), stream)
    head, parts = learner.statistics, [learner.features_of(stream.task(k).train) for k in range(3)]
    x, y = (torch.cat(side) for side in zip(*parts, strict=True))
    lifted = (x @ head.projection).relu()
    assert lifted.shape == (60, 9)
    matrix = lifted.T @ lifted + float(head.ridge) * torch.eye(9, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, lifted.T @ torch.nn.functional.one_hot(y, 6).double())
    torch.testing.assert_close(head.weight, expected.T, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(learner.scores(x), lifted @ expected, rtol=1e-6, atol=1e-6)


def test_ranpac_chooses_lambda_on_the_task_alone_as_its_code(toy_learner):
    stream = toy_stream()
    learner = run(toy_learner("ranpac", **FRESH, ranpac_ridge="task", backbone=toy_backbone().double()), stream)
    data = stream.task(2).train
    features, labels = learner.features_of(data)
    order = data.order(0, "ridge")
    assert not torch.equal(order, torch.arange(20))
    lifted = learner.statistics.lift(features)[order]
    targets = torch.nn.functional.one_hot(labels[order], 6).double()
    errors = []
    for ridge in RIDGES:
        own = lifted[:16]
        matrix = own.T @ own + ridge * torch.eye(9, dtype=torch.float64)
        weight = torch.linalg.solve(matrix, own.T @ targets[:16])
        errors.append(float((lifted[16:] @ weight - targets[16:]).square().sum(dim=1).mean()))
    rows = [json.loads(line) for line in (learner.log.folder / "metrics.jsonl").read_text().splitlines()]
    told = [row for row in rows if row["kind"] == "head"]
    assert len(told) == 3 and told[-1]["errors"][7:] == pytest.approx(errors[7:], rel=1e-6)
    assert told[-1]["ridge"] == float(learner.statistics.ridge) == RIDGES[errors.index(min(errors))]


def test_ranpac_cosine_scores_differ_by_lengths_alone(toy_learner):
    images = images_of(toy_stream())
    linear, cosine = (run(toy_learner("ranpac", **FRESH, ranpac_scores=s), toy_stream()) for s in ("linear", "cosine"))
    assert linear.sigma is None and float(cosine.sigma) != 1
    assert torch.equal(linear.statistics.weight, cosine.statistics.weight)
    with torch.no_grad():
        lifted = linear.statistics.lift(linear.features(images))
        lengths = lifted.norm(dim=1)[:, None] * linear.statistics.weight.norm(dim=1)
        torch.testing.assert_close(cosine.logits(images) * lengths / cosine.sigma, linear.logits(images).double())


def test_ranpac_ablations(toy_learner):
    plain = run(toy_learner("ranpac", **FRESH, use_RP=False, tuned_epoch=0), toy_stream())
    simple = run(toy_learner("simplecil", head="ridge"), toy_stream())
    images = images_of(toy_stream())
    with torch.no_grad():
        torch.testing.assert_close(plain.logits(images), simple.logits(images), rtol=1e-4, atol=1e-4)
    assert plain.statistics.projection is None
    assert run(toy_learner("ranpac", **FRESH, head="ncm"), toy_stream()).statistics.weight.shape == (6, 9)


def test_one_image_keeps_lambda_and_that_is_said(toy_learner):
    learner = toy_learner("ranpac", **FRESH, ranpac_ridge="task")
    run(learner, toy_stream(toy_dataset(train=1), init_cls=1, increment=1), tasks=1)
    assert float(learner.statistics.ridge) == 1
    assert "has none to choose the ridge head's lambda on" in (learner.log.folder / "run.log").read_text()


def test_ranpac_keeps_finished_features(toy_learner):
    learner = toy_learner("ranpac", **FRESH)
    assert learner.prefix_layer == 0
    run(learner, toy_stream(), tasks=1)
    assert learner.prefix_layer == learner.backbone.depth


def test_ease_trains_a_fresh_set_a_task_and_leaves_the_others(toy_learner, sessions):
    stream, learner = toy_stream(), toy_learner("ease", **FRESH, init_epochs=2, later_epochs=1, later_lr=0.02)
    found = []
    for index in range(3):
        learner.begin_task()
        learner.learn(stream.task(index))
        learner.consolidate(stream.task(index))
        assert not learner.training and learner.adapters_per_layer() == [index + 1] * 3
        found.append(adapters_of(learner))
        assert learner.features(images_of(stream)).shape == (8, 16 * (index + 1))
    for older, newer in itertools.pairwise(found):
        assert all(torch.equal(newer[k], v) for k, v in older.items())
    assert [s[:2] for s in sessions] == [(2, 0.05), (1, 0.02), (1, 0.02)]
    assert all(f".adapters.{t}." in n or "local_head" in n for t, s in enumerate(sessions) for n in s[2])
    assert sum(p.numel() for p in learner.trained.values()) == learner.planned_parameters()[1][1]
    names = [f"statistics.{n}" for n in ("sums", "owner", "weight")]
    assert set(names) <= set(learner.own_state()) and learner.statistics.owner.tolist() == [0, 0, 1, 1, 2, 2]


def test_ease_with_the_plain_model_begins_with_its_features(toy_learner):
    learner = run(toy_learner("ease", **FRESH, use_init_ptm=True, beta=1.0), toy_stream())
    images = images_of(toy_stream())
    with torch.no_grad():
        features = learner.features(images)
        assert features.shape == (8, 64)
        assert torch.equal(features[:, :16], features_in(learner.backbone, images, [PLAIN]))
        torch.testing.assert_close(features[:, :16], toy_backbone().eval()(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "keys", "fault"),
    [
        ("ranpac", {"head_projection_dim": 5}, "the width of ranpac's projection is M"),
        ("ranpac", {"head": "ncm", "ranpac_scores": "cosine"}, 'ranpac_scores: has an effect with head "ridge" only'),
        ("ease", {"head_projection_dim": 5}, "ease has no random projection"),
        ("ease", {"later_lr": 0.01, "min_lr": 0.02, "init_lr": 0.1}, "min_lr: 0.02 is above later_lr 0.01"),
        ("ease", {"moni_adam": True}, "moni_adam: ease implements only false"),
    ],
)
def test_what_does_not_act_is_refused(method, keys, fault, tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"model_name": method, "dataset": "digits", "init_cls": 2, "increment": 2} | keys))
    assert main.main(["--config", str(path), "--check"]) == 2
    assert fault in capsys.readouterr().err
