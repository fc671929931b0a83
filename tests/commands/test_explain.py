"""Sentences and verdicts on finished runs, from numbers made by hand."""

import json

import pytest

import main
from commands import explain
from commands import verify as cards
from tests.helpers.runs import tiny_experiment

RESULTS = {
    "model_name": "sema", "dataset": "digits", "seed": 7, "task_classes": [[4, 2], [7]],
    "seconds": [{"train": 60.0}, {"train": 5.0}], "top1_curve": [90.0, 80.0], "accuracy_matrix": [[90.0], [85.5, 70.0]],
    "last_accuracy": 80.0, "average_accuracy": 85.0, "forgetting": 4.5, "task_oracle_accuracy": 95.0,
    "selection_history": [], "test_evaluations": 2,
}  # fmt: skip
MACHINE = {"device": "cpu", "device_name": "a CPU", "backbone": {"tag": "embedded", "weight_hash": "ab"}}


def epoch(phase, loss, task=1):
    return {"kind": "epoch", "task": task, "phase": phase, "loss": loss}


def paragraphs(rows=(), **changes):
    return explain.explain(RESULTS | changes, MACHINE, rows).split("\n\n")


def test_a_run_in_sentences():
    rows = [epoch("func", 0.5, task=0), epoch("func", 0.25, task=0)]
    begin, first, second, end = paragraphs(rows)
    assert "Phase func ran 2 epochs" in paragraphs(rows, model_name="slca")[1]
    assert begin == (
        "sema learned the 3 classes of digits in 2 tasks (seed 7) in 1:05 on a CPU. "
        "Its backbone is embedded, weights ab."
    )
    assert first == (
        "Task 1 brought classes 4, 2. Phase func (adapters, router and head) ran 2 epochs: the loss went from 0.5 to 0.25. "
        "It then knew 90.00 % of the test images."
    )
    assert second == (
        "Task 2 brought class 7. Over all 3 classes seen it then scored 80.00 % (90.00 before): 70.00 on the new ones. "
        "Task 1 lost most, 4.50 points, and stands at 85.50."
    )
    assert end == (
        "At the end: last accuracy 80.00, average 85.00, forgetting 4.50. Of the 20.00 points that lack, 15.00 are confusions "
        "between tasks (with the task known it scores 95.00) and 5.00 within a task. Test data were scored 2 times, nothing "
        "was selected on them."
    )


def test_classes_images_and_cost_in_sentences():
    end = paragraphs(
        last_accuracy_interval=[75.0, 84.5], learning_accuracy=80.0,
        class_accuracy=[None, None, 70.0, None, 90.0, None, None, 70.0],
        class_images=[None, None, 10, None, 10, None, None, 20], class_confusion=[[7, 2, 6], [2, None, 3]],
        calibration={"ece": 3.25}, operations=[2_000_000_000, 3_000_000_000], cpu_hours=0.5, gpu_hours=0.25,
    )[-1]  # fmt: skip
    assert (
        "From its test images alone the last accuracy is known to 75.00 to 84.50 (95 %). Right after they came, tasks stood at "
        "80.00 in the mean. The worst class is 2 with 70.00, the best 4 with 90.00. Most often 7 is taken for 2: 6 images of "
        "20. Its confidence is off by 3.25 points in the mean (ECE). A prediction takes 3.000 GFLOP, 1.50 times as many as "
        "after the first task. The run took 0.500 CPU hours and 0.250 GPU hours. Test data"
    ) in end


def test_scans_grow_or_say_how_near_it_was():
    scan = {"kind": "detect", "task": 1, "threshold": 1.5, "expanded": False}
    low = [scan | {"layer": 3, "scores": [0.5, 9.0]}, scan | {"layer": 4, "scores": [1.25, 1.0]}]
    assert (
        "no layer grew: the nearest was layer 4, where an adapter's score is 1.00 and the threshold 1.5."
        in (paragraphs(low)[2])
    )
    grown = [*low, scan | {"layer": 5, "scores": [2.0, 1.75], "expanded": True}]
    assert "passed the threshold 1.5 at layer 5 (scores 2.00, 1.75): 1 adapter joined there." in paragraphs(grown)[2]
    endless = [scan | {"layer": 3, "scores": [None]}, scan | {"layer": 4, "scores": [None, 0.25]}]
    assert "the nearest was layer 4, where an adapter's score is 0.25 and" in paragraphs(endless)[2]
    grown = [scan | {"layer": 5, "scores": [None, 1.75], "expanded": True}]
    assert "at layer 5 (scores not finite, 1.75): 1 adapter" in paragraphs(grown)[2]


def test_rounds_competitions_novelty_and_merges():
    rows = [epoch("func 1", 1.0), epoch("func 2", 0.125)]
    rows += [
        {"kind": "novelty", "task": 1, "best": 0.25, "threshold": 0.5, "skill": 2, "spawn": True, "reason": "mean"}
    ]
    merge = {"kind": "consolidation", "task": 1, "method": "ema", "alpha": 0.5}
    rows += [merge | {"layer": 0, "fast_share": 0.25}, merge | {"layer": 1, "fast_share": 0.75}]
    won = {"task": 1, "winner": 1, "accuracies": [50.0, 75.0], "split": "test", "samples": 8}
    text = paragraphs(rows, selection_history=[won])
    for sentence in (
        "ran 2 epochs in 2 rounds: the loss went from 1 to 0.125.",
        "Its similarity to what is known is 0.250, the threshold 0.500: it got the new expert 2 (decided by mean).",
        "Expert 1 won on TEST data with 75.00 (the others: 50.00).",
        "Fast was merged into slow by ema (alpha 0.5) in 2 layers; fast gave 50 % of the adapters' output.",
    ):
        assert sentence in text[2]
    assert text[3].endswith("something was SELECTED on them: the numbers are optimistic.")
    alone = paragraphs(selection_history=[won | {"winner": 0, "accuracies": [50.0], "split": "held-out"}])[2]
    assert "Its one expert scored 50.00 on 8 held-out images." in alone
    tied = paragraphs(selection_history=[won | {"accuracies": [75.0, 75.0]}])[2]
    assert "won on TEST data with 75.00 (the others: 75.00), the lower loss deciding." in tied


def test_merges_of_more_levels_and_what_became_of_experts():
    merge = {"kind": "consolidation", "task": 1, "method": "ema", "alpha": 1.0, "layer": 0, "fast_share": 0.5}
    untouched = {"kind": "consolidation", "task": 1, "layer": 0, "level": 1}
    rows = [untouched, merge | {"level": 2}, merge | {"level": 3, "fast_share": None}]
    rows += [
        {"kind": "rank", "task": 1, "expert": 2, "rank": 8, "before": 0.5, "after": 0.25},
        {"kind": "freeze", "task": 1, "converged": True, "learned": [0, 2]},
        {"kind": "merge", "task": 1, "expert": 1, "into": 0},
        {"kind": "replay", "task": 1, "added": 3, "kept": 9},
    ]
    for sentence in (
        "Fast was merged into level 2 by ema (alpha 1) in 1 layer. "
        "Level 2 was merged into level 1 by ema (alpha 1) in 1 layer; level 2 gave 50 % of the adapters' output.",
        "Expert 2 stalled and grew to rank 8: its held-out loss went from 0.5 to 0.25.",
        "The loss reached a plateau: experts 0, 2 are frozen for good.",
        "Expert 1 was hardly used and joined expert 0.",
        "3 images of it were stored for replay, 9 in all.",
    ):
        assert sentence in paragraphs(rows)[2]
    assert "plateau" not in paragraphs([rows[4] | {"converged": False}])[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run with its folder and a card that it fits."""
    place, patch = tmp_path_factory.mktemp("run"), pytest.MonkeyPatch()
    try:
        run = [*tiny_experiment("finetune", place, patch), "--out", str(place / "logs")]
        assert main.main(run) == 0
    finally:
        patch.undo()
    (folder,) = place.glob("logs/finetune/*/seed_3")
    settings, results = (json.loads((folder / name).read_text()) for name in ("config.json", "results.json"))
    weights = json.loads((folder / "environment.json").read_text())["backbone"]["weight_hash"]
    card = {"weights": weights, "settings": cards.digest(settings), "tolerance": 1.5}
    return folder, card | {"top1_curve": {"3": [round(a, 2) for a in results["top1_curve"]]}}


@pytest.fixture
def verify(finished, capsys):
    """Function: exit code and text of --verify with a card; None removes it."""
    folder, _ = finished
    path = folder / "config.json"
    before = path.read_text()

    def run(card, **settings):
        path.write_text(json.dumps(json.loads(before) | {"expected": card} | settings))
        code = main.main(["--verify", str(folder)])
        said = capsys.readouterr()
        return code, said.out + said.err

    yield run
    path.write_text(before)


def test_a_run_that_gave_its_numbers_passes(finished, verify):
    card = finished[1]
    code, text = verify(card)
    assert code == 0 and text.endswith("PASS: every number is as expected\n")
    first, second = card["top1_curve"]["3"]
    code, text = verify(card | {"top1_curve": {"3": [first - 1.4, second]}})
    assert code == 0 and text.endswith("PASS: all within the tolerance of 1.5 points\n")


def test_a_run_that_did_not_says_which_task_diverged_first(finished, verify):
    card = finished[1]
    first, second = card["top1_curve"]["3"]
    code, text = verify(card | {"top1_curve": {"3": [first, second + 1.6]}})
    assert code == 1 and "FAIL: task 2 diverged first, by more than the tolerance of 1.5 points" in text
    assert verify(card | {"top1_curve": {"3": [first, second, 50.0]}})[0] == 1
    code, text = verify(card | {"weights": "0"})
    assert code == 1 and "FAIL: the backbone's weights have the hash" in text and "PASS" not in text


def test_what_cannot_be_compared_says_why(finished, verify):
    card = finished[1]
    code, text = verify(card, ffn_num=5)
    assert code == 2 and "other settings" in text
    code, text = verify(card | {"top1_curve": {"4": [1.0]}})
    assert code == 2 and "for the seeds 4, not for 3" in text
    code, text = verify(None, about="Shows x. Expected: was not run here: no weights. Time: -")
    assert code == 2 and "Expected: was not run here: no weights." in text


def test_a_run_without_expected_numbers_gets_them_ready_made(finished, verify):
    _, text = verify(None)
    card, _ = json.JSONDecoder().raw_decode(text.partition('"expected": ')[2])
    assert card == finished[1] | {"tolerance": cards.TOLERANCE}
    assert verify(card)[0] == 0


def test_a_cell_of_a_sweep_is_compared_with_the_file_that_ships_its_settings(finished, tmp_path):
    folder, card = finished
    with pytest.raises(ValueError, match="no expected numbers"):
        cards.verify(folder, tmp_path)
    (tmp_path / "alone.json").write_text("{}")
    (tmp_path / "twin.json").write_text(json.dumps({"expected": card}))
    assert cards.verify(folder, tmp_path)[0]
    (tmp_path / "finetune.json").write_text(json.dumps({"expected": card | {"settings": "others"}}))
    assert cards.verify(folder, tmp_path)[0]


def test_the_digest_ignores_defaults_and_what_changes_no_number(finished):
    settings = json.loads((finished[0] / "config.json").read_text())
    own = cards.digest(settings)
    assert cards.digest(settings | {"seed": [9], "about": "x"}) == own
    assert cards.digest({k: v for k, v in settings.items() if k != "head_drift"}) == own  # a default
    assert cards.digest(settings | {"ffn_num": 5}) != own


def test_explain_from_the_command_line(finished, capsys, tmp_path):
    assert main.main(["--explain", str(finished[0])]) == 0
    assert capsys.readouterr().out.startswith("finetune learned the 10 classes of digits in 2 tasks (seed 3)")
    assert main.main(["--explain", str(tmp_path)]) == 2
    assert "is no run folder, or its run is not finished" in capsys.readouterr().err
    assert main.main(["--explain", "a", "--verify", "b"]) == 2
    capsys.readouterr()
    assert main.main(["--explain", str(finished[0]), "--compare", "b"]) == 2
    assert "--explain and --compare are two things" in capsys.readouterr().err
    assert main.main(["--explain", str(finished[0]), "--set", "epochs=1"]) == 2
