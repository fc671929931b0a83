"""The report's part by class and image: exact cells from a small results.json, and the page of a toy run in pictures."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import models
from tests.helpers.toy import learn_and_score, toy_backbone, toy_dataset, toy_settings, toy_stream
from utils.report import page, plots_classes, tables_classes
from utils.report.html import Folded, Pictures
from utils.run import mistake_images
from utils.run.log import RunLog
from utils.run.record import RunRecord, results_json

RESULTS = {
    "task_classes": [[2, 0], [1]],
    "class_names": ["ant", "<b>bee", "cat"],
    "class_images": [4, 5, 10],
    "class_accuracy": [50.0, 100.0, 90.0],
    "class_accuracy_when_new": [100.0, 100.0, None],
    "class_confusion": [[0, 1, 2], [2, None, 1]],
    "class_confusion_beyond": 0,
    "mistakes": [
        {"row": 7, "image": "x/a.png", "true": 0, "predicted": 1, "margin": 2.5},
        {"row": 3, "image": None, "true": 2, "predicted": None, "margin": None},
    ],
    "last_accuracy_interval": [62.0, 94.5],
}


def table(blocks):
    (part,) = [b for b in blocks if isinstance(b, Folded)]
    return [list(map(str, row)) for row in part.blocks[0].rows]


def test_classes_in_order_of_arrival_with_their_intervals():
    assert table(tables_classes.class_rows(RESULTS)) == [
        ["cat", "1", "10", "90.00", "59.6 to 98.2", "-", "-"],
        ["ant", "1", "4", "50.00", "15.0 to 85.0", "100.00", "-50.00"],
        ["<b>bee", "2", "5", "100.00", "56.6 to 100.0", "100.00", "0.00"],
    ]
    assert tables_classes.interval_text(RESULTS).endswith("from 19 test images: 62.00 to 94.50. ")


def test_pairs_and_mistakes_with_names():
    note, pairs = tables_classes.pair_rows(RESULTS)
    assert note.text.startswith("3 test images of 19 are wrong, in 2 pairs")
    assert pairs.rows[0] == ["ant", "<b>bee", 2, "50.0", "1, 2"]
    assert pairs.rows[1][1:] == ["no class (scores that are no numbers)", 1, "10.0", "1, -"]
    shots = [mistake_images.Shot(7, "data:image/png;base64,x", 8), mistake_images.Shot(99, "other", 8)]
    blocks = tables_classes.mistake_rows(RESULTS, shots)
    (pictures,) = [b for b in blocks if isinstance(b, Pictures)]
    assert pictures.shots == [("data:image/png;base64,x", 8, "ant, taken for <b>bee")]
    assert table(blocks) == [["x/a.png", "ant", "<b>bee", "2.500"], ["row 3", "cat", "no class", "-"]]


def test_the_matrix_comes_back_from_the_pairs():
    assert plots_classes.table_of(RESULTS, [2, 0, 1]) == [[9, 0, 0], [0, 2, 2], [0, 0, 5]]


def test_results_of_older_versions_have_none_of_it():
    older = {"task_classes": [[0]], "class_order": [0]}
    assert tables_classes.interval_text(older) == "" and plots_classes.draw(older) == {}
    for blocks in (
        tables_classes.class_rows(older), tables_classes.pair_rows(older), tables_classes.mistake_rows(older, []),
        tables_classes.calibration_rows(older), tables_classes.computation_rows(older),
    ):  # fmt: skip
        assert blocks == []


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder, stream and record of a toy run of finetune in two tasks."""
    folder, stream = tmp_path_factory.mktemp("toy") / "run", toy_stream(init_cls=4)
    log = RunLog(folder, console=False)
    learner = models.build(toy_settings("finetune"), toy_backbone(), 6, 1, log)
    record = RunRecord("finetune", "toy", 1, stream.order, [stream.order[:4], stream.order[4:]])
    for index in range(2):
        learn_and_score(learner, stream, index, record)
    log.close()
    return folder, stream, record


def test_what_a_run_records_is_consistent(toy):
    _, stream, record = toy
    results = results_json(record, stream.original_names())
    right = sum(a * n / 100 for a, n in zip(results["class_accuracy"], results["class_images"], strict=True))
    wrong = sum(n for *_, n in results["class_confusion"])
    assert results["class_images"] == [4] * 6 and right + wrong == pytest.approx(24)
    assert right / 24 * 100 == pytest.approx(results["last_accuracy"])
    new = [results["class_accuracy_when_new"][c] for c in stream.order[4:]]
    assert sum(new) / 2 == pytest.approx(results["accuracy_matrix"][1][1])
    first = results["accuracy_matrix"][0][0], results["accuracy_matrix"][1][1]
    assert results["learning_accuracy"] == pytest.approx(sum(first) / 2)
    assert results["learning_accuracy_known"] >= results["learning_accuracy"]
    assert sum(results["calibration"]["images"]) == 24 and len(results["ece_curve"]) == 2
    assert min(results["operations"]) > 0 and results["cpu_hours"] > 0 and results["gpu_hours"] == 0
    labels = toy_dataset().test.labels
    assert all(labels[m["row"]] == m["true"] != m["predicted"] for m in results["mistakes"])
    assert len(results["mistakes"]) == wrong > 0
    assert RunRecord.from_dict(record.to_dict()) == record


def test_the_pictures_are_the_test_images_of_the_mistakes(toy):
    folder, stream, record = toy
    before = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
    mistake_images.write(folder, stream, record.by_image["mistakes"])
    assert before == (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())
    shots = mistake_images.read(folder)
    assert [s.row for s in shots] == [row for row, *_ in record.by_image["mistakes"]][: mistake_images.MOST]
    sheet = np.asarray(Image.open(folder / "samples" / "mistakes.png"))
    expected = toy_dataset().test.images[shots[0].row].permute(1, 2, 0).numpy()
    assert (sheet[:, :8] == expected).all() and shots[0].side == 8
    (folder / "samples" / "mistakes.png").write_bytes(b"damaged")
    assert mistake_images.read(folder) == []
    mistake_images.write(folder, stream, [])
    assert not (folder / "samples" / "mistakes.png").exists()


def test_the_page_shows_all_of_it(toy):
    folder, stream, record = toy
    mistake_images.write(folder, stream, record.by_image["mistakes"])
    html = page.write_report(folder, results_json(record, ["<i>a", *stream.original_names()[1:]]), {}, {}).read_text()
    for heading in ("Accuracy by class", "What is taken for what", "Wrongly classified images", "Calibration"):
        assert f"<h2>{heading}</h2>" in html
    assert html.count('<img alt="" src="data:image/png') == len(mistake_images.read(folder))
    assert "GFLOP an image" in html and "Expected calibration error (ECE)" in html and "<i>a" not in html
    for name in ("classes", "class_confusion", "calibration"):
        picture = Image.open(io.BytesIO((folder / "plots" / f"{name}.png").read_bytes()))
        assert picture.width > 500
