"""Degenerate data, for every method and head: one image, identical or black images, batches of one. No NaN anywhere.

Runs go through the runner's own `learn_and_score`; metrics.jsonl refuses what is not finite, so a row of that kind fails too.
"""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import main
import models
from backbone.experts import novelty
from backbone.experts.descriptor import Descriptor
from models.learner.held_out import hold_out
from tests.helpers.methods import HEADS, METHODS
from tests.helpers.toy import learn_and_score, toy_backbone, toy_dataset, toy_settings, toy_stream
from utils.config.strict_json import read_json
from utils.data.dataset import Dataset
from utils.data.images import ImageArray
from utils.evaluation import metrics
from utils.evaluation.head_drift import drift_of
from utils.evaluation.scores import evaluate, spans
from utils.files import storage
from utils.run import record as run_record
from utils.run.log import RunLog

QUICK = {
    "init_cls": 2,
    "increment": 1,
    "epochs": 1,
    "func_epoch": 1,
    "rd_epoch": 1,
    "tuned_epoch": 1,
    "detect_batch_size": 4,
}
ONE = {"batch_size": 1, "detect_batch_size": 1, "eval_batch_size": 1}
ALL = {"batch_size": 500, "detect_batch_size": 500, "eval_batch_size": 500}


def noise(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)


def of_counts(*counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    return noise(len(labels)), labels


def blackened(chosen):
    images, labels = of_counts(4, 4, 4, 4)
    images[chosen(labels)] = 0
    return images, labels


# name: (training images and labels of four classes in tasks of 2, 1 and 1, settings)
CASES = {
    "a class and a task of one image": (of_counts(1, 5, 1, 4), {}),
    "one image a class": (of_counts(1, 1, 1, 1), ONE),
    "batches of one": (of_counts(3, 3, 3, 3), ONE),
    "a batch larger than the data": (of_counts(2, 2, 2, 2), ALL),
    "identical in a class": ((np.repeat(noise(4), 4, axis=0), np.repeat(np.arange(4), 4)), {}),
    "all identical": ((np.repeat(noise(1), 16, axis=0), np.repeat(np.arange(4), 4)), ALL),
    "all black": (blackened(lambda labels: labels >= 0), {}),
    "black, then noise": (blackened(lambda labels: labels < 2), {}),
    "noise, then black": (blackened(lambda labels: labels >= 2), {}),
}


def degenerate_run(folder, method, case, backbone=None, **settings):
    """Learns and scores all tasks of a case; returns (learner, results, rows of metrics.jsonl, text of run.log)."""
    (images, labels), keys = CASES[case]
    dataset = Dataset("toy", [f"class {c}" for c in range(4)], *[ImageArray(images, labels)] * 2, "small")
    cfg = toy_settings(method, **QUICK | keys | settings)
    stream = toy_stream(dataset, init_cls=2, increment=1, shuffle=False)
    record = run_record.RunRecord(method, "toy", 1, stream.order, [list(span) for span in spans(stream.sizes)])
    with RunLog(folder / "run", console=False) as log:
        learner = models.build(cfg, backbone or toy_backbone(), 4, 1, log)
        for index in range(len(stream)):
            learn_and_score(learner, stream, index, record)
    with torch.inference_mode():
        for span_images, *_ in (next(iter(stream.test(k).batches(100, augment=False))) for k in range(len(stream))):
            assert torch.isfinite(learner.logits(span_images)).all()
    assert all(torch.isfinite(v).all() for v in learner.own_state().values())
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    storage.write_json(folder / "results.json", run_record.results_json(record))  # refuses NaN and infinity
    return learner, read_json(folder / "results.json")[0], rows, (folder / "run" / "run.log").read_text()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("method", "head"), HEADS)
def test_degenerate_data_give_finite_numbers(method, head, case, tmp_path):
    _, results, rows, _ = degenerate_run(tmp_path, method, case, head=head)
    assert all(isinstance(value, float) for value in results["top1_curve"])
    assert [row["task"] for row in rows if row["kind"] == "task"] == [0, 1, 2]


NOVEL = {"novelty_threshold_mode": "fixed", "novelty_threshold": 2.0}
PROTOTYPE = {**NOVEL, "router_column_start": "prototype"}
SETTINGS = [
    ("sema", {"detect_scope": "task", "detect_sign": "signed", "detect_std_floor": 0.001, "record_when": "end"}),
    ("sema", {"exp_threshold": 0.0, "buffer_size": 3}),
    ("sema", {"exp_threshold": 0.0, "ffn_adapter_type": "nested_lora", "ffn_adapter_scalar": 1.0}),
    ("nested_lora", {"nested_lora_consolidation_method": "svd"}),
    ("nested_lora", {"nested_lora_consolidation_method": "svd", "nested_lora_activation": "none"}),
    ("nested_lora", {"nested_lora_consolidation_method": "ties", "nested_lora_activation": "none"}),
    ("nested_lora", {"nested_lora_consolidation_method": "ema", "nested_lora_consolidation_alpha": 0.5}),
    ("nested_lora", {"nested_lora_consolidation_method": "pam", "nested_lora_eval": "fast"}),
    ("nested_lora", {"nested_lora_levels": 3, "head_recalibration": True, "nested_lora_reset": "zero"}),
    ("moe_parallel", {"moe_heads": "per_expert", "moe_eval": "sum", "moe_reset": "winner"}),
    ("moe_parallel", {"moe_mode": "task"}),
    ("dylora_moe", {**PROTOTYPE, "top_k_experts": 1}),
    ("dylora_moe", {**PROTOTYPE, "router_granularity": "sample", "router_scope": "layer"}),
    ("dylora_moe", {**NOVEL, "lora_target": ("qkv", "fc2"), "distill_coef": 1.0, "freeze_on_convergence": False}),
    ("dylora_moe", {"novelty_similarity": "median", "replay_per_class": 1, "distill_coef": 1.0, "distill_on": "logits"}),
    ("dylora_moe", {"expert_rank_max": 6, "epochs": 2, "plateau_epochs": 1, "plateau_tolerance": 0.9}),
    ("dylora_moe", {"grow_experts": False, "merge_below": 0.9}),
    ("sparse_moe", {"top_k_experts": 1, "expert_capacity": 0.5, "router_noisy": True, "router_bias_rate": 0.1}),
    ("sparse_moe", {"router_granularity": "sample", "moe_dispatch": "loop"}),
    ("simplecil", {"head": "ridge", "head_projection_dim": 9}),
    ("inflora", {"lamb": 1.0, "lame": 1.0, "rank": 16}),
    ("inflora", {"short_first_basis": True, "lamb": 0.9, "late_schedule": True}),
    ("sd_lora", {"restart_magnitudes": True, "epochs": 0}),
    ("slca", {"ca_task_by_size": True, "ca_with_logit_norm": 0.0, "ca_samples": 2}),
    ("ranpac", {"ranpac_ridge": "task", "ranpac_scores": "cosine"}),
    ("ease", {"use_init_ptm": True, "beta": 1.0}),
    ("l2p", {"batchwise_prompt": True, "head_type": "token", "size": 1, "top_k": 1}),
    ("dualprompt", {"batchwise_prompt": True, "scrambled_e_prompt": True, "size": 2, "optimizer": "sgd"}),
    ("coda_prompt", {"prompt_param": (90, 2, 0.5), "drop_last": True, "cosine_off_by_one": True}),
]  # fmt: skip


@pytest.mark.parametrize("case", ["one image a class", "all identical", "black, then noise"])
@pytest.mark.parametrize(("method", "settings"), SETTINGS, ids=lambda value: value if isinstance(value, str) else "")
def test_what_divides_by_a_spread_has_settings_for_data_without_one(method, settings, case, tmp_path):
    degenerate_run(tmp_path, method, case, **settings)


def test_features_that_are_zero_have_no_direction_and_harm_no_head(tmp_path):
    """A backbone without biases and positions maps black images to zero: no mean, norm or Gram matrix is left."""
    backbone = toy_backbone()
    with torch.no_grad():
        for name, parameter in backbone.vit.named_parameters():
            if name.endswith("bias") or name in ("cls_token", "pos_embed"):
                parameter.zero_()
    for head in ("ncm", "ridge"):
        folder = tmp_path / head
        learner, results, _, _ = degenerate_run(folder, "simplecil", "all black", backbone=backbone, head=head)
        assert learner.statistics.weight.count_nonzero() == 0  # else the features were not zero
        assert results["top1_curve"] == pytest.approx([50.0, 100 / 3, 25.0])  # all is called the first class


# Fallbacks, each told in the log ------------------------------------------------------------------------------------------


def test_a_class_of_one_image_is_trained_on_and_the_others_are_held_out_as_ever(toy_learner):
    learner, task = toy_learner("finetune"), toy_stream(init_cls=6, shuffle=False).task(0)
    few = toy_stream(init_cls=6, shuffle=False).task(0)
    few.train.rows, few.train.labels = few.train.rows[9:], few.train.labels[9:]  # class 0 keeps one image
    how = {"key": "some_ratio", "draw": "selection", "purpose": "selection"}
    _, held = hold_out(learner, task, 0.3, **how)
    kept, of_few = hold_out(learner, few, 0.3, **how)
    assert held.rows.tolist() == task.train.split(0.3, "selection")[1].rows.tolist()
    assert of_few.rows.tolist() == [row for row, label in zip(held.rows, held.labels, strict=True) if label]
    assert sorted([*kept.rows, *of_few.rows]) == few.train.rows.tolist() and 0 in kept.labels
    log = (learner.log.folder / "run.log").read_text()
    assert log.count("1 class has one training image, which some_ratio does not hold out for the selection") == 1


def test_where_no_image_can_be_held_out_the_winner_is_selected_on_training_images_and_that_is_said(tmp_path):
    _, results, rows, log = degenerate_run(tmp_path, "moe_parallel", "one image a class")
    assert [(s["split"], s["samples"]) for s in results["selection_history"]] == [("training", n) for n in (2, 1, 1)]
    assert not [row for row in rows if row["kind"] == "held_out"]
    assert log.count("no image can be held out, the winner is selected on training images") == 3


def test_no_rank_grows_without_images_to_see_a_stall_on(tmp_path):
    keys = {"expert_rank_max": 6, "epochs": 2, "plateau_epochs": 1, "plateau_tolerance": 0.9}
    _, _, rows, log = degenerate_run(tmp_path / "few", "dylora_moe", "one image a class", **keys)
    assert not [row for row in rows if row["kind"] in ("rank", "held_out")] and "rank_growth_val_ratio" in log
    assert [
        r for r in degenerate_run(tmp_path / "more", "dylora_moe", "batches of one", **keys)[2] if r["kind"] == "rank"
    ]


@pytest.mark.parametrize("scope", ["shared", "layer"])
def test_a_new_expert_for_a_task_equal_to_the_first_starts_with_an_even_share(scope, tmp_path):
    """Its router column cannot be aimed: the difference of equal images is rounding."""
    how = {**PROTOTYPE, "router_scope": scope, "init_lr": 1e-9}
    rows = degenerate_run(tmp_path, "dylora_moe", "all identical", **how)[2]
    last = [row for row in rows if row["kind"] == "routing"][-1]
    assert len(last["gate"][0]) == 3 and np.allclose(last["gate"], 1 / 3, atol=1e-5)


def test_a_record_of_zeros_divides_by_rounding_where_a_floor_is_set_and_by_zero_where_the_original_does():
    descriptor = Descriptor(4, 2, 5)
    descriptor.observe([torch.zeros(5)])
    losses = torch.tensor([0.0, 1e-9, 2.0])
    floored = descriptor.z_scores(losses, std_floor=1e-3)
    assert floored[0] == 0 and torch.isfinite(floored).all() and floored[2] > 1e6 > floored[1] > 0
    faithful = descriptor.z_scores(losses)
    assert faithful[0].isnan() and faithful[1:].isinf().all()


def test_likeness_to_a_task_of_the_same_images_is_none_whatever_rounding_says():
    middle = torch.full((8,), 3.0, dtype=torch.float64)
    noise_of_rounding = middle + 1e-6 * torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).double()
    off = middle + torch.eye(8)[:2].double()
    stored = torch.cat([off, noise_of_rounding])
    found = novelty.similarities(noise_of_rounding, stored, [0, 0, 1, 1], middle, "max")
    assert found.tolist() == [0, 0]
    assert novelty.similarities(off, stored, [0, 0, 1, 1], middle, "max").tolist() == [1, 0]


# Nothing to score ---------------------------------------------------------------------------------------------------------


def test_a_task_without_test_images_keeps_its_place_and_has_no_accuracy(toy_learner):
    learner, stream = toy_learner("simplecil"), toy_stream()
    record = run_record.RunRecord("simplecil", "toy", 1, stream.order, [list(span) for span in spans(stream.sizes)])
    whole, test = [], stream.test
    stream.test = lambda index: test(index) if index != 1 else test(1).subset([])
    for index in range(3):
        learn_and_score(learner, stream, index, record)
        whole.append(evaluate(learner, stream, index, torch.device("cpu"))[0])
    assert [score.samples for score in whole[-1]] == [8, 0, 8] and whole[-1][1].correct == 0
    results = run_record.results_json(record)
    assert results["accuracy_matrix"][2][1] is None and results["accuracy_matrix"][2][2] is not None
    rows = [json.loads(line) for line in (learner.log.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["accuracy"][1] for row in rows if row["kind"] == "task" and row["task"]] == [None, None]


def test_without_any_test_image_every_figure_is_none(toy_learner):
    none = metrics.Score(0, 0, None, 0)
    learner = toy_learner("simplecil")
    assert drift_of(learner, toy_stream(), 1, learner.statistics, [none, none], {}, 0.0) is None
    record = run_record.RunRecord("simplecil", "toy", 1, [0, 1], [[0], [1]])
    for t in range(2):
        how = {"trainable_parameters": 0, "total_parameters": 1, "seconds": {}, "images": 0}
        record.add_task([none] * (t + 1), adapters_per_layer={}, **how)
    results = run_record.results_json(record)
    figures = {"last_accuracy", "average_accuracy", "final_task_mean", "forgetting", "backward_transfer"}
    assert {results[key] for key in figures | {"task_oracle_accuracy", "images_per_second"}} == {None}
    assert results["top1_curve"] == [None, None]


# A whole run --------------------------------------------------------------------------------------------------------------


def picture_folder(place):
    """Four classes: one image, identical images, black ones, noise; and a test image of each."""
    pictures = {
        "a": noise(1),
        "b": np.repeat(noise(1, 1), 4, axis=0),
        "c": np.zeros((4, 3, 8, 8), np.uint8),
        "d": noise(4),
    }
    for part, most in (("train", 4), ("test", 1)):
        for name, images in pictures.items():
            (place / part / name).mkdir(parents=True)
            for number, image in enumerate(images[:most]):
                Image.fromarray(image.transpose(1, 2, 0)).save(place / part / name / f"{number}.png")
    return place


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m in ("finetune", "simplecil") else pytest.mark.slow) for m in METHODS]
)
def test_a_whole_run_on_degenerate_classes_writes_numbers_alone(method, tmp_path, capsys):
    values = {
        "dataset": "folder",
        "data_path": str(picture_folder(tmp_path / "pictures")),
        "num_workers": 0,
        "seed": [1],
    }
    values |= {"init_cls": 2, "increment": 1, "epochs": 1, "func_epoch": 1, "rd_epoch": 1, "exp_threshold": 0.5}
    values |= {"tuned_epoch": 1, "init_epochs": 1, "M": 20, "prompt_param": [10, 4, 0.5], "ca_samples": 8}
    schema = models.settings_of(method).model_fields
    config = tmp_path / "odd.json"
    config.write_text(json.dumps({"model_name": method, **{k: v for k, v in values.items() if k in schema}}))
    assert main.main(["--config", str(config), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0, (
        capsys.readouterr()
    )
    (folder,) = (tmp_path / "out" / "odd").glob("*/seed_1")
    results, faults = read_json(folder / "results.json")  # strict: NaN and Infinity are faults
    assert not faults and [len(row) for row in results["accuracy_matrix"]] == [1, 2, 3]
    page = re.sub(r"base64,[A-Za-z0-9+/=\s]+", "", (folder / "report.html").read_text())
    assert "accuracy" in page and not re.findall(r"(?<![A-Za-z])(?:nan|inf|infinity)(?![A-Za-z])", page, re.IGNORECASE)


def test_a_class_without_images_is_named_before_anything_runs():
    whole = toy_dataset()
    kept = whole.train.labels != 3
    without = ImageArray(whole.train.images[torch.from_numpy(kept)], whole.train.labels[kept])
    with pytest.raises(ValueError, match="no training images for 1 of 6 classes: class 3"):
        toy_stream(Dataset("toy", whole.class_names, without, whole.test, "small"))
