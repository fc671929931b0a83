"""report.html: complete, self-contained, well-formed, and safe against what users write into their settings."""

import re
from html.parser import HTMLParser

import pytest

from utils.metrics import Score
from utils.page import load_rows, write_report
from utils.report import RunRecord, results_json
from utils.runlog import RunLog

VOID = {"meta", "br", "hr", "link", "img"}


class Checker(HTMLParser):
    """Collects text, ids, references and attributes; fails on tags that do not nest."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.refs, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "img", "iframe"), tag
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href", "src"):
                assert value.startswith("#"), value
                self.refs.append(value[1:])
            self.refs += re.findall(r"url\(#([^)]+)\)", value or "")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data


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
                seconds={"train": 2.0}, images=10, selections=[{"winner": "<k>"}],
            )  # fmt: skip
    settings = {
        "about": "50 % <b>of & all</b>",
        "lr": 0.01,
        "path": "</td><script>alert(1)</script>",
        "sweep": {"a": [1]},
    }
    environment = {"command": "python main.py --set 'a=\"<x>\"'", "versions": {"torch": "2.15"}, "device_name": "Chip"}
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
    assert html.count("<svg") == 5
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html
    for text in (
        "sema on digits, 2 tasks, seed 7",
        "50 % <b>of & all</b>",  # shown as written, not as markup
        "python main.py --set 'a=\"<x>\"'",
        "</td><script>alert(1)</script>",
        "87.50",
        "75.00",
        "1,234",
        '{"winner": "<k>"}',
        "versions.torch",
        "sweep.a",
    ):
        assert text in checker.text, text


def test_pictures_are_files_too_and_stale_ones_go(folder):
    names = ["accuracy_curve", "accuracy_matrix", "adapters", "detection", "loss"]
    assert sorted(path.name for path in (folder / "plots").iterdir()) == [f"{name}.png" for name in names]
    record = RunRecord("simplecil", "digits", 7, [0], [[0]])
    record.add_task(
        [Score(8, 7, None, 8)],
        adapters_per_layer={}, trainable_parameters=0, total_parameters=1, seconds={}, images=0,
    )  # fmt: skip
    write_report(folder, results_json(record), {}, {}, rows=[])
    assert sorted(path.stem for path in (folder / "plots").iterdir()) == names[:2]


def test_rows_of_a_killed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "a"}\n{"kind": "b')
    assert load_rows(path) == [{"kind": "a"}]
    path.write_bytes(b"{]\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: not a file of JSON lines"):
        load_rows(path)
