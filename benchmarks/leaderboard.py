"""Every method on the embedded data sets, by one sweep a set, and the tables of the docs: `python -m benchmarks.leaderboard`.

1. `--files` writes exps/leaderboard_<set>.json: a sweep whose arms are the files exps/<method>_<set>.json.
2. `python main.py --config exps/leaderboard_<set>.json --jobs 2` runs it: 5 seeds, each with a different class order.
3. `--collect OUT` copies the numbers of the finished runs into benchmarks/leaderboard.jsonl and writes everything that is
   derived from that file: the tables of PAGES, and in each shipped file the reproduction card (`expected`) and the figures
   at the end of `about`. Files in ALONE get their card from `python main.py --config exps/<file>.json --out OUT`.
4. Without an option it writes the tables of PAGES again from benchmarks/leaderboard.jsonl.

Budget, equal for all: one backbone and its weights, one augmentation, batches of 32, at most 10 (digits, fashion) or 5 (icons,
glyphs, fractals) passes over a task's images in each phase that trains on them (besides those, SEMA's descriptors make 20
passes over stored mean tokens), rates chosen on held-out training images; the last epoch counts.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import models
from benchmarks import leaderboard_tables as tables
from benchmarks import ranks
from commands import verify
from utils.config.strict_json import read_json
from utils.evaluation.metrics import summarise
from utils.report import results as report_results
from utils.text import number

ROOT = Path(__file__).resolve().parent.parent
SETS = (*tables.RANKED, *tables.SMOKE)
# files that have a card but no row in the table
ALONE = (
    "sema_digits_short",
    "debug_moe_parallel",
    "debug_nested_lora",
    *(f"{method}_icons_100task" for method in ("finetune", "nested_lora", "ranpac", "simplecil")),
    *(f"{method}_domains" for method in ("dylora_moe", "sema", "simplecil", "sparse_moe")),
)
SEEDS = [1993, 1994, 1995, 1996, 1997]
RUNS = Path(__file__).with_suffix(".jsonl")
WRITER = "written by python -m benchmarks.leaderboard"
COMMON = ("dataset", "init_cls", "increment", "seed", "backbone_type", "batch_size")
# shipped files besides those named after a method
VARIANTS = ("joint_bound", "sema_corrected", *(f"{method}_original" for method in tables.ORIGINALS))

Run = dict[str, Any]


def shipped(name: str) -> dict[str, dict[str, Any]]:
    """The experiment of each method on a set, by the first part of its file's name; in the order of the table."""
    if name in ALONE:
        values = read_json(path_of(name, ""))[0]
        return {values["model_name"]: values}
    paths = {method: path_of(name, method) for method in sorted([*models.available(), *VARIANTS])}
    return {method: read_json(path)[0] for method, path in paths.items() if path.is_file()}


def path_of(name: str, method: str) -> Path:
    return ROOT / "exps" / (f"{name}.json" if name in ALONE else f"{method}_{name}.json")


def sweep_file(name: str) -> dict[str, Any]:
    """The sweep over all methods of a set; the first is the nearest class mean, with which the others are compared."""
    files = shipped(name)
    base = {k: v for k, v in files["simplecil"].items() if k in ("model_name", *COMMON)}
    arms = []
    for method in ("simplecil", *(m for m in files if m != "simplecil")):
        values = {k: v for k, v in files[method].items() if k not in ("about", "expected", "prefix", "seed", "sweep")}
        arms.append({"prefix": method, **{k: v for k, v in values.items() if k == "model_name" or base.get(k) != v}})
    about = (
        f"Shows every method on {name} with its shipped settings, compared with the nearest class mean. Source: the files "
        f"exps/<method>_{name}.json, from which python -m benchmarks.leaderboard --files writes this one. Expected: the "
        f"table in docs/results.md. Time: hours on 2 CPU cores, no download; finished runs are never repeated."
    )
    return {"about": about, **base, "seed": SEEDS, "sweep": arms}


def collect(out: Path, earlier: Iterable[Run]) -> list[Run]:
    """The runs recorded earlier with the finished ones below `out`, which replace those of the same set, method and seed."""
    runs = {(r["set"], r["method"], r["seed"]): r for r in earlier}
    for name in (*SETS, *ALONE):
        wanted = {verify.digest(_resolved(values)): m for m, values in shipped(name).items()}
        folder = f"leaderboard_{name}" if name in SETS else name
        for path in sorted(out.glob(f"{folder}/*/seed_*/results.json")):
            settings, results, environment = (
                report_results.read(path.parent, f) for f in ("config.json", "results.json", "environment.json")
            )
            digest = verify.digest(settings)
            if (method := wanted.get(digest)) is None:
                print(f"left out, no shipped file has its settings: {path.parent}")
                continue
            numbers = {
                k: results[k] for k in ("last_accuracy", "average_accuracy", "forgetting", "task_oracle_accuracy")
            }
            key = name, method, results["seed"]
            before = runs.get(key, {})
            took = round(sum(sum(task.values()) for task in results["seconds"]), 1)
            if before.get("settings") == digest:  # the same run: the slower one waited for other programs
                took = min(took, before["seconds"])
            runs[key] = {
                "set": name, "method": method, "seed": results["seed"], "settings": digest, "head": settings["head"],
                "weights": environment["backbone"]["weight_hash"], "commit": (environment["git"] or {}).get("commit"),
                "top1_curve": [round(a, 2) for a in results["top1_curve"]],
                **{k: None if v is None else round(v, 4) for k, v in numbers.items()},
                "trainable": max(results["trainable_parameters"]),
                "seconds": took,
            }  # fmt: skip
    return [runs[key] for key in sorted(runs)]


def _resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    from backbone import catalogue
    from utils.config import resolve

    return resolve.resolve(
        dict(values), source="", settings_of=models.settings_of, methods=models.available(), backbones=catalogue.names
    ).values


def card(runs: list[Run]) -> dict[str, Any]:
    """The reproduction card of one file from its recorded runs, which share settings and weights."""
    assert len({(r["settings"], r["weights"]) for r in runs}) == 1, (
        "runs of other settings or weights: collect them again"
    )
    curves = {str(r["seed"]): r["top1_curve"] for r in runs}
    return {
        "weights": runs[0]["weights"],
        "settings": runs[0]["settings"],
        "tolerance": verify.TOLERANCE,
        "top1_curve": curves,
    }


def figures(runs: list[Run], seeds: list[int]) -> str:
    """The end of a file's `about`: the results of its recorded runs, and the time of one. `seeds` are those of the file."""
    last, average = (summarise(r[k] for r in runs) for k in ("last_accuracy", "average_accuracy"))
    shown = [
        f"{word} {number(s.mean, 1)}" + (f" ± {number(s.std, 1)}" if s.std is not None else "")
        for word, s in (("last", last), ("average", average))
    ]
    finished = [r["seed"] for r in runs]
    which = "these seeds" if finished == seeds else f"seed {', '.join(map(str, finished))}"
    return (
        f"Expected: {', '.join(shown)} percent over {which}, each with a different class order (benchmarks/leaderboard.jsonl). "
        f"Time: about {number(tables.seconds(runs), 0)} s a seed on one of two busy CPU cores, no download."
    )


def with_figures(text: str, runs: list[Run]) -> str:
    """An experiment file's text with `figures` as the end of its `about`. Raises ValueError if that has no such end."""
    end = figures(runs, json.loads(text)["seed"])
    changed, count = re.subn(r'Expected: [^"]*"', lambda _: f'{end}"', text, count=1)
    if not count:
        raise ValueError("about has no part that begins with Expected:")
    return changed


def with_card(text: str, values: Mapping[str, Any]) -> str:
    """An experiment file's text with the card as its last key."""
    body = text.partition('  "expected": {')[0].rstrip().removesuffix("}").rstrip().rstrip(",")
    curves = [f'      "{seed}": {json.dumps(curve)}' for seed, curve in values["top1_curve"].items()]
    parts = [f'    "{key}": {json.dumps(values[key])}' for key in ("weights", "settings", "tolerance")]
    parts.append('    "top1_curve": {\n' + ",\n".join(curves) + "\n    }")
    return body + ',\n  "expected": {\n' + ",\n".join(parts) + "\n  }\n}\n"


def recorded() -> list[Run]:
    """The runs in benchmarks/leaderboard.jsonl."""
    return [json.loads(line) for line in RUNS.read_text(encoding="utf-8").splitlines()] if RUNS.is_file() else []


# (page, name of the table in its markers, the function that writes it)
PAGES: tuple[tuple[str, str, Callable[[Iterable[Run]], str]], ...] = (
    ("README.md", "results", tables.short_table),
    ("docs/results.md", "leaderboard", tables.ranked_table),
    ("docs/results.md", "differences", tables.against_reference),
    ("docs/results.md", "smoke", tables.smoke_table),
    ("docs/results.md", "ranks", ranks.table),
    ("docs/originals.md", "departures", tables.departures),
)


def with_tables(page: str, text: str, runs: Iterable[Run]) -> str:
    """`text` of a page with its tables of `runs` between their markers. Raises ValueError if a marker is missing."""
    runs = list(runs)
    for name, write in ((name, write) for where, name, write in PAGES if where == page):
        begin, end = f"<!-- {name}: {WRITER} -->", f"<!-- end of {name} -->"
        before, marker, rest = text.partition(begin)
        if not marker or end not in rest:
            raise ValueError(f"{page} lacks {begin} or {end}")
        text = f"{before}{begin}\n{write(runs)}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--files", action="store_true", help="write the sweep files")
    ask.add_argument(
        "--collect", type=Path, metavar="OUT", help="add the finished runs below OUT; write tables and cards"
    )
    args = ask.parse_args()
    if args.files:
        for name in SETS:
            text = json.dumps(sweep_file(name), indent=2, ensure_ascii=False)
            (ROOT / "exps" / f"leaderboard_{name}.json").write_text(text + "\n", encoding="utf-8")
    if args.collect:
        runs = collect(args.collect, recorded())
        RUNS.write_text("".join(json.dumps(run) + "\n" for run in runs), encoding="utf-8")
        for name in (*SETS, *ALONE):
            for method in shipped(name):
                path = path_of(name, method)
                if of_method := [r for r in runs if (r["set"], r["method"]) == (name, method)]:
                    text = path.read_text(encoding="utf-8")
                    text = with_figures(text, of_method) if name in SETS else text
                    path.write_text(with_card(text, card(of_method)), encoding="utf-8")
    for page in dict.fromkeys(page for page, _, _ in PAGES):
        path = ROOT / page
        path.write_text(with_tables(page, path.read_text(encoding="utf-8"), recorded()), encoding="utf-8")
    print(tables.ranked_table(recorded()))


if __name__ == "__main__":
    main()
