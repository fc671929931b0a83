"""What the studies share: which runs are run, skipped and stored, and how arms are compared."""

import argparse
import json

import pytest

from benchmarks import nested, routed, study


def worker(arm, name, seed):
    if arm == "broken":
        raise ValueError("no such adapter")
    return {"last": {"ncm": seed / 10}, "seconds": 1.0}


def values_of(arm, name):
    return {"about": f"{arm} is words", "seed": [1, 2], "rank": 4, "arm": arm}


def args_for(tmp_path, **other):
    return argparse.Namespace(**({"out": tmp_path / "out", "jobs": 1, "kept": False} | other))


def test_runs_are_made_once_failures_named_and_other_settings_run_anew(tmp_path, capsys):
    keys = [("toy", arm, seed) for arm in ("one", "broken") for seed in (1, 2)]
    runs = study.run_all(worker, values_of, keys, args_for(tmp_path), tmp_path / "stored.jsonl")
    assert list(runs) == keys[:2] and runs["toy", "one", 2]["last"] == {"ncm": 0.2}
    assert "toy, broken, 1: no such adapter" in capsys.readouterr().err
    study.keep(runs, tmp_path / "stored.jsonl")
    elsewhere = args_for(tmp_path, kept=True, out=tmp_path / "elsewhere")
    again = study.run_all(
        None, values_of, keys[:2], elsewhere, tmp_path / "stored.jsonl"
    )  # nothing is left to a worker
    assert {k: r["last"] for k, r in again.items()} == {k: r["last"] for k, r in runs.items()}

    def changed(arm, name):
        return values_of(arm, name) | {"rank": 8}

    study.run_all(worker, changed, keys[:1], elsewhere, tmp_path / "stored.jsonl")
    (path,) = (tmp_path / "elsewhere" / "toy").iterdir()
    assert json.loads(path.read_text())["settings"] == study.fingerprint(changed("one", "toy"))


def test_words_and_seeds_do_not_change_a_fingerprint():
    one = study.fingerprint(values_of("a", "toy"))
    assert one == study.fingerprint(values_of("a", "toy") | {"about": "else", "seed": [3]})
    assert one != study.fingerprint(values_of("a", "toy") | {"rank": 5})


def test_keeping_adds_to_what_is_kept_and_drops_the_seconds(tmp_path):
    path = tmp_path / "stored.jsonl"
    for seed in (1, 2, 1):
        study.keep(
            {("toy", "one", seed): {"set": "toy", "arm": "one", "seed": seed, "seconds": 3.0, "last": seed}}, path
        )
    assert [(r["seed"], "seconds" in r) for r in study.read(path)] == [(1, False), (2, False)]


def test_differences_are_paired_by_seed():
    runs = {
        "a": {1: {"last": {"linear": 0.5, "ncm": 0.25}}, 2: {"last": {"linear": 0.75, "ncm": 0.25}}},
        "b": {1: {"last": {"ncm": 0.5}}, 2: {"last": {"ncm": 0.5}}, 3: {"last": {"ncm": 0.0}}},
    }
    lines = study.differences(runs, ("a", "absent")).split("\n")
    assert lines[0] == "| difference in last accuracy | linear - a | ncm - a | ridge - a |"
    assert lines[3] == "| b | - | +25.0 [+25.0, +25.0] | - |"


@pytest.mark.parametrize("module", [nested, routed])
def test_what_is_kept_belongs_to_the_arms_as_they_are(module):
    runs = study.read(module.KEPT)
    assert len(runs) > 100
    for run in runs:
        assert run["settings"] == study.fingerprint(module.values_of(run["arm"], run["set"])), (run["arm"], run["set"])
