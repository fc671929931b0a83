"""report.html: complete, self-contained, well-formed, and safe against what users write into their settings."""

import json
import re
from html import unescape

import pytest

import models
from tests.helpers.pages import Checker, cells, html_of
from utils.config.hashing import departing_digest
from utils.evaluation.metrics import Score
from utils.report import figures, links, page, plots, tables
from utils.report import settings as report_settings
from utils.report.page import write_report
from utils.report.results import load_rows
from utils.run.log import RunLog
from utils.run.record import RunRecord, results_json


@pytest.fixture
def folder(tmp_path):
    record = RunRecord("sema", "digits", 7, [1, 0], [[1], [0]])
    with RunLog(tmp_path, console=False) as log:
        for t in range(2):
            for epoch in range(3):
                log.row("epoch", task=t, phase="func", epoch=epoch, epochs=3, loss=1.0 / (epoch + 1), accuracy=0.5)
            log.row("detect", task=t, layer=3, scores=[1.5, 2.0], threshold=1.0, expanded=True)
            record.add_task(
                [Score(8, 7 - t, None, 8)] * (t + 1),
                adapters_per_layer={3: t + 1}, trainable_parameters=1234, total_parameters=56789,
                seconds={"train": 2.0 + t}, images=10, selections=[{"winner": "<k>"}],
            )  # fmt: skip
    settings = {
        "about": "50 % <b>of & all</b>",
        "lr": 0.01,
        "path": "</td><script>alert(1)</script>",
        "sweep": {"a": [1]},
    }
    environment = {
        "command": "python main.py --set 'prefix=\"<x>\"'",
        "versions": {"torch": "2.15"},
        "device_name": "Chip",
    }
    path = write_report(tmp_path, results_json(record), settings, environment)
    assert path == tmp_path / "report.html"
    return tmp_path


def test_report_is_whole_and_self_contained(folder):
    html = (folder / "report.html").read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert checker.refs and set(checker.refs) <= set(checker.ids)
    assert "http:" not in html and "https:" not in html
    assert html.count("<svg") == 8 and checker.links == ["config.json", "results.json", "metrics.jsonl", "run.log"]
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html
    for text in (
        "sema on digits, 2 tasks, seed 7",
        "50 % <b>of & all</b>",  # shown as written, not as markup
        "python main.py --set 'prefix=\"<x>\"'",
        "</td><script>alert(1)</script>",
        "87.50",
        "75.00",
        "1,234",
        '{"winner": "<k>"}',
        "versions.torch",
        'sweep{"a": [1]}',
    ):
        assert text in checker.text, text


def test_pictures_are_files_too_and_stale_ones_go(folder):
    names = ["accuracy_curve", "accuracy_matrix", "adapters", "cost", "detection", "errors", "forgetting", "loss"]
    assert sorted(path.name for path in (folder / "plots").iterdir()) == [f"{name}.png" for name in names]
    record = RunRecord("simplecil", "digits", 7, [0], [[0]])
    record.add_task(
        [Score(8, 7, None, 8)],
        adapters_per_layer={}, trainable_parameters=0, total_parameters=1, seconds={}, images=0,
    )  # fmt: skip
    write_report(folder, results_json(record), {}, {}, rows=[])
    assert sorted(path.stem for path in (folder / "plots").iterdir()) == []  # of one task


def nested_report(folder, change=lambda results: None, rows=()):
    """(text of the tags, text a reader sees) of a report of two tasks, the second with a competition of two experts."""
    record = RunRecord("moe_parallel", "digits", 7, [1, 0], [[1], [0]])
    facts = {"losses": [0.5, 0.25], "margin": 12.5, "samples": 40}
    for t in range(2):
        entry = {"task": 1, "winner": 1, "accuracies": [61.25, 73.75], "split": "validation", **facts}
        record.add_task(
            [Score(8, 7 - t, None, 8)] * (t + 1),
            adapters_per_layer={}, trainable_parameters=1, total_parameters=2, seconds={}, images=0,
            selections=[entry] if t else [],
            head_drift={"task": 1, "stale": 0.5, "recomputed": 0.625, "cosine": 0.98765} if t else None,
        )  # fmt: skip
    results = results_json(record)
    change(results)
    html = write_report(folder, results, {}, {}, rows=list(rows)).read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return html, checker.text


def test_selection_table_has_the_winner_in_bold(tmp_path):
    html, text = nested_report(tmp_path)
    assert cells(2, 1, "12.50", "validation", 40, "61.25", "<b>73.75</b>") in html
    assert "optimistic" not in text and '<p class="warn">' not in html
    assert cells(2, "50.00", "62.50", "12.50", "0.9877") in html
    assert sorted(path.stem for path in (tmp_path / "plots").iterdir()) == [
        "accuracy_curve",
        "accuracy_matrix",
        "errors",
        "forgetting",
        "head_drift",
        "selection",
    ]


def test_selection_on_test_data_is_said_above_the_tiles_and_above_the_table(tmp_path):
    html, _ = nested_report(tmp_path, lambda results: results["selection_history"][0].update(split="test"))
    places = [
        m.start() for m in re.finditer("The winner was selected on test data, so the accuracies are optimis", html)
    ]
    first, second = places
    assert first < html.index('<div class="tiles">') < html.index("<h2>Selection history</h2>") < second
    assert second < html.index("<th>winner</th>")


def test_other_selections_are_shown_as_they_are(tmp_path):
    def change(results):
        results["selection_history"].append({"layer": 3, "kept": "<b>", "split": "test"})

    html, text = nested_report(tmp_path, change)
    assert '{"layer": 3, "kept": "<b>", "split": "test"}' in text and "<b>73.75</b>" in html
    assert "selected on test data" in text


def test_decisions_on_novelty_are_a_table_and_not_json(tmp_path):
    def change(results):
        first = {
            "best": None,
            "low": None,
            "high": None,
            "threshold": None,
            "reason": "first",
            "skill": 0,
            "spawn": True,
        }
        later = {
            "best": 0.26891,
            "low": 0.25,
            "high": 0.28,
            "threshold": 0.3,
            "reason": "novel",
            "skill": 1,
            "spawn": True,
        }
        decisions = [{"kind": "novelty", "task": t, "images": 40, **facts} for t, facts in enumerate((first, later))]
        results["selection_history"] = [*decisions, {"layer": 3}]

    html, text = nested_report(tmp_path, change)
    expected = ["2", "40", "0.269", "0.250", "0.280", "0.300", "novel", "1", "yes"]
    assert cells(*expected) in html and '{"layer": 3}' in text
    assert '"reason"' not in text


def test_merges_have_a_line_a_task_and_layer(tmp_path):
    common = {"kind": "consolidation", "level": 1, "expert": 0, "slow_norm": 1.0, "fast_norm": 2.0, "cosine": 0.5}
    common |= {"slow_output": 0.25, "fast_output": 0.75, "fast_share": 0.75}
    after = {"slow_norm_after": 3.0, "fast_norm_after": 1.5, "slow_output_after": 1.0, "fast_output_after": 0.0}
    done = {"merged": True, "error": 1.5e-9, "method": "<svd>", "alpha": 0.5, "rank": 8, **after}
    rows = [{**common, "task": 0, "layer": 4, **done}, {**common, "task": 1, "layer": 4, "merged": False}]
    html, text = nested_report(tmp_path, rows=rows)
    assert cells(1, 4, "1.000", "2.000", "3.000", "1.500", "0.500", "0.750", "1.5e-09", 8) in html
    assert cells(2, 4, "1.000", "2.000", "-", "-", "0.500", "0.750", "-", "-") in html
    assert "Slow and fast in numbers (merged by <svd>, alpha 0.5)" in text and "<th>adapter</th>" not in html
    html, text = nested_report(tmp_path, rows=[{**row, "adapter": n} for n, row in enumerate(rows[1:] * 2)])
    assert cells(2, 4, 0, "1.000") in html and cells(2, 4, 1, "1.000") in html and "(never merged)" in text


def test_results_of_older_versions_still_give_a_report(tmp_path):
    def older(results):
        del results["head_drift"], results["selection_history"], results["task_oracle_curve"]
        del results["task_confusion"], results["wrong_task"], results["peak_memory_by_task"]

    html, text = nested_report(tmp_path, older)
    assert html.count("<svg") == 3  # of the errors only the last task's were counted then
    for heading in ("Selection history", "Head drift", "Slow and fast adapters"):
        assert heading not in text


def test_errors_are_told_in_parts_and_by_task(tmp_path):
    def change(results):
        results.update(wrong_task=[[0, 0], [3, 1]], task_confusion=[[7, 1], [3, 5]])

    html, text = nested_report(tmp_path, change)
    assert cells(2, "75.00", "100.00", "25.00", "0.00", "-50.00") in html
    assert cells("task 1", "<b>7</b>", 1) + "</tr><tr>" + cells("task 2", 3, "<b>5</b>") in html
    assert cells(1, "12.50") in html and "Forgetting as numbers" in text


def detect(task, layer, scores, expanded, scan=0):
    return {
        "kind": "detect", "task": task, "scan": scan, "layer": layer, "scores": scores, "threshold": 1.0, "expanded": expanded
    }  # fmt: skip


SCANS = [
    detect(1, 3, [2.5, 1.5], True),  # all adapters of a layer must pass: the smallest score counts
    detect(1, 4, [0.75], False),
    detect(1, 4, [0.25], False, scan=1),  # the largest of a task's scans
    detect(2, 3, [None], True),  # infinite, since it expanded
    detect(2, 4, [None], False),  # not a number
    detect(2, 5, [None, 4.0], True),
]


def test_what_other_thresholds_would_have_done():
    inf = float("inf")
    assert tables.would_expand(SCANS) == {1: {3: 1.5, 4: 0.75}, 2: {3: inf, 4: -inf, 5: 4.0}}
    assert tables.threshold_rows([{"kind": "epoch"}]) == []
    html = html_of(tables.threshold_rows(SCANS))
    assert (
        "3 of 5 scanned layers expanded at 1. By the same scores they would have expanded at 0.5: 4, at 1: 3, at 2: 2, "
        in html
    )
    assert cells(2, "3", "3, 4", "3", "-", "-") in html and cells(3, "3, 5", "3, 5", "3, 5", "3, 5", "3, 5") in html


def test_settings_that_depart_come_first_and_all_are_folded(tmp_path):
    results = results_json(RunRecord("sema", "digits", 7, [0], [[0]]))
    settings = {"about": "x", "model_name": "sema", "init_lr": 0.5, "seed": [1], "head": "linear"}
    html = page.page(results, settings, {}, {}, [], (), {"init_lr": 0.01, "seed": [1], "head": "linear"})
    table = "<tr>" + cells("model_name", "sema", "-") + "</tr><tr>" + cells("init_lr", "0.5", "0.01") + "</tr></table>"
    assert table in html and "<summary>All 4 settings</summary>" in html
    assert html.count("<td>head</td>") == 1 and "<td>about</td>" not in html
    (text,) = re.findall(r"save it as x.json.*?<pre>(.*?)</pre>", html, re.DOTALL)
    assert json.loads(unescape(text)) == {"about": "x", "model_name": "sema", "init_lr": 0.5}


def test_defaults_are_as_a_resolved_file_has_them():
    defaults = models.settings_of("sema").defaults()
    assert "dataset" not in defaults and defaults["seed"] == [1993]
    settings = models.settings_of("sema")(model_name="sema", dataset="digits", init_cls=1, increment=1)
    values = settings.model_dump(mode="json")
    assert {k for k in values if values[k] != defaults.get(k, "none")} == {
        "model_name",
        "dataset",
        "init_cls",
        "increment",
    }


def test_commands_name_the_commit_and_whether_more_was_changed():
    git = {"commit": "abc", "dirty": True}
    assert tables.again({"git": git, "command": "python main.py"}) == [
        "git checkout abc   # with changes that are in no commit",
        "pip install -r requirements.txt",
        "python main.py",
    ]
    assert tables.again({"git": None, "command": "x"}) == ["pip install -r requirements.txt", "x"]


def test_rows_of_a_killed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "a"}\n{"kind": "b')
    assert load_rows(path) == [{"kind": "a"}]
    path.write_bytes(b"{]\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: not a file of JSON lines"):
        load_rows(path)


def test_repaired_statistics_and_other_heads_have_their_columns(tmp_path):
    def change(results):
        results["head_drift"][0]["repaired"] = 60.0
        results["heads"] = {"ridge": [87.5, 50.0], "lda": [None, 43.21]}

    html, text = nested_report(tmp_path, change)
    assert cells(2, "50.00", "60.00", "62.50", "2.50", "0.9877") in html and "<th>repaired</th>" in html
    assert cells(2, "50.00", "43.21") in html and "What another head would have scored" in text
    assert "What another head" not in nested_report(tmp_path)[1]


# ------------------------------------------------------------------------------------- settings, description, links


def test_settings_stand_in_groups_each_once():
    settings = {"model_name": "sema", "rd_lr": 0.1, "device": "cpu", "dataset": "digits", "init_cls": 2, "seed": [1]}
    groups = report_settings.grouped_keys(settings)
    assert groups == {
        "The experiment": ["model_name", "seed"],
        "Data": ["dataset"],
        "Tasks": ["init_cls"],
        "Method and training": ["rd_lr"],
        "Machine and speed": ["device"],
    }
    note, table, folded = report_settings.tables(settings, settings | {"rd_lr": 0.2}, {"rd_lr": "a rate"})
    assert note.text == "1 of 6 settings differ from their default."
    assert table.head == ["key", "value", "default", "meaning"] and table.rows == [["rd_lr", "0.1", "0.2", "a rate"]]
    assert [block.text for block in folded.blocks[::2]] == [*groups]


def stale(settings, command="python main.py --config x.json"):
    return report_settings.changed(settings, {"command": command}, {"lr": 0.1, "seed": [1]})


def test_a_description_is_not_printed_over_changed_settings(tmp_path):
    settings = {"about": "Expected: 99", "lr": 0.5, "seed": [3]}
    assert stale(settings) == stale(settings, "python main.py --set seed=[3] --set 'prefix=a b'") == ""
    text = stale(settings, "python main.py --set lr=0.5 --set=seed=[3]")
    assert text.startswith("Settings of this run differ from those of its experiment file (--set lr): ")
    card = {"settings": departing_digest({"lr": 0.5}, {"lr": 0.1}), "top1_curve": {}}
    assert stale(settings | {"expected": card}, "python main.py --set lr=0.5") == ""  # what the numbers belong to
    assert stale(settings | {"expected": card, "lr": 0.6}).startswith(
        "Settings of this run differ"
    )  # the cell of a sweep
    assert stale({"lr": 0.5}, "python main.py --set lr=0.5") == ""  # nothing was described
    assert report_settings.set_keys("a 'torn") == []
    results = results_json(RunRecord("sema", "digits", 7, [0], [[0]]))
    for command, shown in (("python main.py", True), ("python main.py --set lr=0.5", False)):
        html = page.page(results, settings | {"expected": None}, {"command": command}, {}, [], (), {"lr": 0.1})
        assert html.count("Expected: 99") == 2 * shown  # above the tiles, and in the settings as a file


def test_pages_of_seeds_lead_to_each_other(tmp_path):
    tmp_path = tmp_path / "hash"
    tmp_path.mkdir()
    for seed in (2, 10, 1):
        folder = tmp_path / f"seed_{seed}"
        folder.mkdir()
        write_report(folder, results_json(RunRecord("sema", "digits", seed, [0], [[0]])), {}, {}, rows=[])
    (tmp_path / "seed_1.old_1").mkdir()
    (tmp_path / "seed_1.old_1" / "report.html").write_text("old", encoding="utf-8")
    for seed, others in ((1, (2, 10)), (2, (1, 10)), (10, (1, 2))):
        checker = Checker()
        checker.feed((tmp_path / f"seed_{seed}" / "report.html").read_text(encoding="utf-8"))
        assert checker.links[:2] == [f"../seed_{other}/report.html" for other in others] and len(checker.links) == 6
    (tmp_path / "report.html").write_text("all", encoding="utf-8")
    sweep = tmp_path.parent / "sweep_1"
    sweep.mkdir()
    (sweep / "report.html").write_text("sweep", encoding="utf-8")
    (sweep / "table.csv").write_text(f"cell,settings,n\na,{tmp_path.name},1\n", encoding="utf-8")
    links.renew_page(tmp_path / "seed_1")
    html = (tmp_path / "seed_1" / "report.html").read_text(encoding="utf-8")
    assert '<a href="../report.html">all seeds</a>' in html
    assert '<a href="../../sweep_1/report.html">the sweep</a>' in html and html.count("<nav>") == 1


def test_figures_for_papers_are_vectors_with_their_fonts(tmp_path):
    figure = plots.curves({"top1_curve": [90.0, 80.0], "top5_curve": [None, None], "average_accuracy": 85.0})
    figure.axes[0].set_title("\u9ce5")  # a letter that the font lacks: no warning
    figures.write(tmp_path / "figures", {"curve": figure})
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["curve.pdf", "curve.svg"]
    svg = (tmp_path / "figures" / "curve.svg").read_text(encoding="utf-8")
    pdf = (tmp_path / "figures" / "curve.pdf").read_bytes()
    assert "<text" not in svg and "<path" in svg and "<image" not in svg
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf and b"/Subtype /Image" not in pdf
