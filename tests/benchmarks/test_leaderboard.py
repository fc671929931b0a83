"""The leaderboard's files, tables and cards are those of the recorded runs and the shipped files."""

import json

import pytest

import models
from benchmarks import leaderboard
from benchmarks import leaderboard_tables as tables
from commands import verify
from utils.config.strict_json import read_json


@pytest.mark.parametrize("page", sorted({page for page, _, _ in leaderboard.PAGES}))
def test_the_tables_of_the_pages_are_up_to_date(page):
    text = (leaderboard.ROOT / page).read_text(encoding="utf-8")
    assert leaderboard.with_tables(page, text, leaderboard.recorded()) == text, "python -m benchmarks.leaderboard"


def test_the_short_table_has_the_best_method_and_the_chosen_ones():
    lines = tables.short_table(leaderboard.recorded()).split("\n")[2:]
    full = tables.ranked_table(leaderboard.recorded()).split("\n")[2:]
    assert f"| {lines[0].split('`')[1]} " in full[0]
    recorded = {run["method"] for run in leaderboard.recorded() if run["set"] in tables.RANKED}
    assert {line.split("`")[1] for line in lines[1:]} == set(tables.SHORT) & recorded - {lines[0].split("`")[1]}


@pytest.mark.parametrize("name", leaderboard.SETS)
def test_each_sweep_holds_every_shipped_file(name):
    file = read_json(leaderboard.ROOT / "exps" / f"leaderboard_{name}.json")[0]
    assert file == leaderboard.sweep_file(name), "python -m benchmarks.leaderboard --files"
    assert {arm["model_name"] for arm in file["sweep"]} == set(models.available())


def test_an_arm_is_the_shipped_experiment():
    sweep = leaderboard.sweep_file("digits")
    base = {k: v for k, v in sweep.items() if k not in ("about", "sweep")}
    for arm in sweep["sweep"]:
        file = leaderboard.shipped("digits")[arm["prefix"]]
        in_sweep, alone = (leaderboard._resolved(values) for values in (base | arm, file))
        assert verify.digest(in_sweep) == verify.digest(alone), arm["prefix"]


def test_every_card_is_made_from_the_kept_runs():
    runs = leaderboard.recorded()
    for name in (*leaderboard.SETS, *leaderboard.ALONE):
        for method, values in leaderboard.shipped(name).items():
            of_file = [r for r in runs if (r["set"], r["method"]) == (name, method)]
            assert values.get("expected") == (leaderboard.card(of_file) if of_file else None), f"{method} on {name}"
            if of_file:  # after a change of the file its recorded runs are those of another experiment
                digest = verify.digest(leaderboard._resolved(values))
                assert digest == of_file[0]["settings"], f"{method} on {name}: run it again"
                ends = leaderboard.figures(of_file, values["seed"]) if name in leaderboard.SETS else ""
                assert values["about"].endswith(ends), f"{method} on {name}"


def test_a_card_is_the_last_key_and_replaces_the_one_before():
    card = {"weights": "w", "settings": "s", "tolerance": 2.0, "top1_curve": {"1": [1.5, 2.0], "2": [3.0]}}
    text = '{\n  "about": "x",\n  "seed": [1]\n}\n'
    once = leaderboard.with_card(text, card)
    assert json.loads(once) == {"about": "x", "seed": [1], "expected": card}
    other = {**card, "tolerance": 1.0}
    assert leaderboard.with_card(once, other) == leaderboard.with_card(text, other)


def test_about_ends_with_what_the_runs_gave():
    def run(seed, last):
        return {"seed": seed, "last_accuracy": last, "average_accuracy": 50.0, "seconds": 4.4}

    tail = (
        ", each with a different class order (benchmarks/leaderboard.jsonl). "
        "Time: about 4 s a seed on one of two busy CPU cores, no download."
    )
    text = '{\n  "about": "x. Expected: much. Time: long.",\n  "seed": [1, 2]\n}\n'
    changed = json.loads(leaderboard.with_figures(text, [run(1, 10.0)]))
    assert changed == {"about": f"x. Expected: last 10.0, average 50.0 percent over seed 1{tail}", "seed": [1, 2]}
    both = [run(1, 10.0), run(2, 12.0)]
    assert json.loads(leaderboard.with_figures(text, both))["about"] == (
        f"x. Expected: last 11.0 ± 1.4, average 50.0 ± 0.0 percent over these seeds{tail}"
    )
    with pytest.raises(ValueError, match="Expected"):
        leaderboard.with_figures('{"about": "x", "seed": [1]}', both)


def test_the_table_has_mean_deviation_and_count():
    def run(method, name, seed, last):
        return {
            "method": method,
            "set": name,
            "seed": seed,
            "last_accuracy": last,
            "average_accuracy": 50.0,
            "seconds": 4.0,
            "task_oracle_accuracy": 99.0,
            "head": "linear",
        }

    runs = [run("a", "digits", 1, 10.0), run("b", "digits", 1, 20.0), run("b", "digits", 2, 30.0)]
    assert tables.table(runs, tables.SMOKE).split("\n")[2:] == [
        "| b | linear | 25.0 ± 7.1 | 50.0 ± 0.0 | - | - | - | - | 99.0, -, - | 2, 0, 0 | 4, -, - |",
        "| a | linear | 10.0 | 50.0 | - | - | - | - | 99.0, -, - | 1, 0, 0 | 4, -, - |",
    ]


def test_the_best_method_is_named_where_all_have_the_same_seeds():
    def run(method, name, seed, last):
        return {"method": method, "set": name, "seed": seed, "last_accuracy": last, "head": "linear"}

    equal = [
        run(m, name, s, last) for m, last in (("joint", 9.0), ("x", 8.0)) for name in tables.RANKED for s in (1, 2)
    ]
    assert tables.short_table(equal).split("\n")[2:] == [
        "| `joint` (highest mean) | linear | 9.0 ± 0.0 | 9.0 ± 0.0 | 2, 2 |"
    ]
    assert tables.short_table(equal[:-1]).split("\n")[2] == "| `joint` | linear | 9.0 ± 0.0 | 9.0 ± 0.0 | 2, 2 |"


def test_differences_from_the_reference_are_paired_by_seed():
    def run(method, seed, last):
        return {"method": method, "set": "icons", "seed": seed, "last_accuracy": last}

    runs = [run("ranpac", seed, last) for seed, last in ((1, 50.0), (2, 60.0), (3, 70.0), (4, 1.0))]
    runs += [run("sema", seed, last) for seed, last in ((1, 51.0), (2, 62.0), (3, 73.0), (9, 1.0))]
    # differences 1, 2, 3: mean 2, std 1, t(0.975, 2) / sqrt(3) = 2.484
    assert tables.against_reference(runs).split("\n")[2:] == ["| sema | +2.00 [-0.48, +4.48] | - |"]


def test_departures_are_paired_by_seed_and_set():
    def run(method, name, seed, last):
        return {"method": method, "set": name, "seed": seed, "last_accuracy": last}

    runs = [run("l2p", "digits", seed, last) for seed, last in ((1, 50.0), (2, 60.0), (3, 70.0), (4, 1.0))]
    runs += [run("l2p_original", "digits", seed, last) for seed, last in ((1, 51.0), (2, 62.0), (3, 73.0), (9, 1.0))]
    runs += [run("l2p", "glyphs", 1, 50.0), run("l2p_original", "glyphs", 1, 40.0), run("l2p", "fractals", 1, 50.0)]
    row = next(line for line in tables.departures(runs).split("\n") if line.startswith("| l2p |"))
    # differences 1, 2, 3: mean 2, std 1, t(0.975, 2) / sqrt(3) = 2.484
    assert row.split(" | ")[2:] == ["60.0 to 62.0: +2.00 [-0.48, +4.48] (n 3)", "50.0 to 40.0: -10.00 (n 1)", "- |"]
