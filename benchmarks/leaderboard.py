"""Every method on the embedded data sets, by one sweep a set, and what is made of it: `python -m benchmarks.leaderboard`.

1. `--files` writes exps/leaderboard_<set>.json: a sweep whose arms are the files exps/<method>_<set>.json.
2. `python main.py --config exps/leaderboard_<set>.json --jobs 2` runs it: 5 seeds, each with its own class order.
3. `--collect OUT` takes the finished runs into benchmarks/leaderboard.jsonl, and makes from that file the tables in README.md
   and, in each shipped file, the reproduction card (`expected`) and the figures that `about` ends with. Files in ALONE get
   their card from `python main.py --config exps/<file>.json --out OUT`.

Budget, equal for all: one backbone and its weights, one augmentation, batches of 32, at most 10 (digits) or 5 (glyphs,
fractals) passes over a task's images in each phase that trains on them (SEMA's descriptors, 20 passes over kept mean tokens,
are beside that), rates chosen on held-out training images; the last epoch counts.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import models
from commands import verify
from utils.compare.table import signed
from utils.config.strict_json import read_json
from utils.evaluation.metrics import paired_difference, summarise
from utils.report import results as report_results
from utils.text import number

ROOT = Path(__file__).resolve().parent.parent
SETS = ("digits", "glyphs", "fractals")
# files that have a card too, but no place in the table: each stands for a set of its own
ALONE = (
    "quickstart",
    "debug_moe_parallel",
    "debug_nested_lora",
    "dylora_moe_domains",
    "sema_domains",
    "simplecil_domains",
    "sparse_moe_domains",
)
SEEDS = [1993, 1994, 1995, 1996, 1997]
KEPT = Path(__file__).with_suffix(".jsonl")
MADE = "made by python -m benchmarks.leaderboard"
COMMON = ("dataset", "init_cls", "increment", "seed", "backbone_type", "batch_size")
# keys that bring back what the originals' code does and our defaults do not: exps/<method>_original_<set>.json set them
ORIGINALS: dict[str, dict[str, Any]] = {
    "l2p": {"batchwise_prompt": True, "decay_other_rows": True},
    "dualprompt": {"batchwise_prompt": True, "scrambled_e_prompt": True, "decay_other_rows": True},
    "coda_prompt": {"cosine_off_by_one": True, "drop_last": True, "decay_other_rows": True},
    "ranpac": {"ranpac_scores": "cosine", "ranpac_ridge": "task"},
    "inflora": {"late_schedule": True, "short_first_basis": True},
    "sd_lora": {"restart_magnitudes": True},
}
# shipped files beside those called after a method
VARIANTS = ("sema_corrected", *(f"{method}_original" for method in ORIGINALS))

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
    """The sweep over all methods of a set, the nearest class mean first: what the others are compared with."""
    files = shipped(name)
    base = {k: v for k, v in files["simplecil"].items() if k in ("model_name", *COMMON)}
    arms = []
    for method in ("simplecil", *(m for m in files if m != "simplecil")):
        own = {k: v for k, v in files[method].items() if k not in ("about", "expected", "prefix", "seed", "sweep")}
        arms.append({"prefix": method, **{k: v for k, v in own.items() if k == "model_name" or base.get(k) != v}})
    about = (
        f"Shows every method on {name} with its shipped settings, compared with the nearest class mean. Source: the files "
        f"exps/<method>_{name}.json, from which python -m benchmarks.leaderboard --files makes this one. Expected: the "
        f"leaderboard in README.md. Time: hours on 2 CPU cores, no download; finished runs are never repeated."
    )
    return {"about": about, **base, "seed": SEEDS, "sweep": arms}


def collect(out: Path, found: Iterable[Run]) -> list[Run]:
    """The kept runs with the finished ones below `out`, which replace those of the same set, method and seed."""
    runs = {(r["set"], r["method"], r["seed"]): r for r in found}
    for name in (*SETS, *ALONE):
        wanted = {verify.digest(_resolved(values), models.settings_of): m for m, values in shipped(name).items()}
        folder = f"leaderboard_{name}" if name in SETS else name
        for path in sorted(out.glob(f"{folder}/*/seed_*/results.json")):
            settings, results, environment = (
                report_results.read(path.parent, f) for f in ("config.json", "results.json", "environment.json")
            )
            digest = verify.digest(settings, models.settings_of)
            if (method := wanted.get(digest)) is None:
                print(f"left out, no shipped file has its settings: {path.parent}")
                continue
            numbers = {
                k: results[k] for k in ("last_accuracy", "average_accuracy", "forgetting", "task_oracle_accuracy")
            }
            runs[name, method, results["seed"]] = {
                "set": name, "method": method, "seed": results["seed"], "settings": digest, "head": settings["head"],
                "weights": environment["backbone"]["weight_hash"], "commit": (environment["git"] or {}).get("commit"),
                "top1_curve": [round(a, 2) for a in results["top1_curve"]],
                **{k: None if v is None else round(v, 4) for k, v in numbers.items()},
                "trainable": max(results["trainable_parameters"]),
                "seconds": round(sum(sum(task.values()) for task in results["seconds"]), 1),
            }  # fmt: skip
    return [runs[key] for key in sorted(runs)]


def _resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    from backbone import catalogue
    from utils.config import resolve

    return resolve.resolve(
        dict(values), source="", settings_of=models.settings_of, methods=models.available(), backbones=catalogue.names
    ).values


def table(runs: Iterable[Run]) -> str:
    """A Markdown row a method: its head; last and average accuracy on each set, mean ± std over the seeds; then, set by set,
    the last accuracy with the task known, the number of seeds and the seconds of a run."""
    by: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        if run["set"] in SETS and not run["method"].endswith("_original"):
            by.setdefault(run["method"], {}).setdefault(run["set"], []).append(run)
    head = [f"{name} {what}" for name in SETS for what in ("last", "average")]
    lines = [
        f"| method | head | {' | '.join(head)} | task known | n | seconds |",
        "|---|---|" + "---:|" * (len(head) + 3),
    ]

    def mean_last(method: str) -> float:
        values = [r["last_accuracy"] for name in SETS for r in by[method].get(name, ())]
        return sum(values) / len(values)

    for method in sorted(by, key=mean_last, reverse=True):
        cells = []
        for name in SETS:
            for column in ("last_accuracy", "average_accuracy"):
                summary = summarise(r[column] for r in by[method].get(name, ()))
                spread = f" ± {number(summary.std, 1)}" if summary.std is not None else ""
                cells.append(f"{number(summary.mean, 1)}{spread}")
        own = [by[method].get(name, []) for name in SETS]
        heads = ", ".join(dict.fromkeys(r["head"] for runs in own for r in runs))
        counts = ", ".join(str(len(runs)) for runs in own)
        known, seconds = (
            ", ".join(number(summarise(r[key] for r in runs).mean, digits) for runs in own)
            for key, digits in (("task_oracle_accuracy", 1), ("seconds", 0))
        )
        lines.append(f"| {method} | {heads} | {' | '.join(cells)} | {known} | {counts} | {seconds} |")
    return "\n".join(lines)


def departures(runs: Iterable[Run]) -> str:
    """A Markdown row for each method whose default departs from its original's code: what that changes in last accuracy, on
    each set from default to original, with the paired difference and its interval."""
    last: dict[tuple[str, str], dict[int, float]] = {}
    for run in runs:
        last.setdefault((run["set"], run["method"]), {})[run["seed"]] = run["last_accuracy"]
    lines = [f"| method | keys of the original's form | {' | '.join(SETS)} |", "|---|---|" + "---|" * len(SETS)]
    for method, keys in ORIGINALS.items():
        cells = []
        for name in SETS:
            ours, theirs = last.get((name, method), {}), last.get((name, f"{method}_original"), {})
            gap = paired_difference(theirs, ours)
            if not gap.n:
                cells.append("-")
                continue
            means = (number(summarise(values[s] for s in ours.keys() & theirs).mean, 1) for values in (ours, theirs))
            # two differences can be equal by chance, and their interval empty
            interval = "" if gap.low is None or gap.n < 3 else f" [{signed(gap.low)}, {signed(gap.high)}]"
            cells.append(f"{' to '.join(means)}: {signed(gap.mean)}{interval}" + f" (n {gap.n})" * (gap.n < len(SEEDS)))
        shown = ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in keys.items())
        lines.append(f"| {method} | {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def card(runs: list[Run]) -> dict[str, Any]:
    """The reproduction card of one file from its kept runs, which share settings and weights."""
    assert len({(r["settings"], r["weights"]) for r in runs}) == 1, (
        "runs of other settings or weights: collect them anew"
    )
    curves = {str(r["seed"]): r["top1_curve"] for r in runs}
    return {
        "weights": runs[0]["weights"],
        "settings": runs[0]["settings"],
        "tolerance": verify.TOLERANCE,
        "top1_curve": curves,
    }


def figures(runs: list[Run], seeds: list[int]) -> str:
    """The end of a file's `about`: what its kept runs gave, and how long one takes. `seeds`: those the file asks for."""
    last, average, seconds = (summarise(r[k] for r in runs) for k in ("last_accuracy", "average_accuracy", "seconds"))
    shown = [
        f"{word} {number(s.mean, 1)}" + (f" ± {number(s.std, 1)}" if s.std is not None else "")
        for word, s in (("last", last), ("average", average))
    ]
    found = [r["seed"] for r in runs]
    which = "these seeds" if found == seeds else f"seed {', '.join(map(str, found))}"
    return (
        f"Expected: {', '.join(shown)} percent over {which}, each with its own class order (benchmarks/leaderboard.jsonl). "
        f"Time: about {number(seconds.mean, 0)} s a seed on one of two busy CPU cores, no download."
    )


def with_figures(text: str, runs: list[Run]) -> str:
    """An experiment file's text with `figures` as the end of its `about`. Raises ValueError if that has no such end."""
    end = figures(runs, json.loads(text)["seed"])
    made, count = re.subn(r'Expected: [^"]*"', lambda _: f'{end}"', text, count=1)
    if not count:
        raise ValueError("about has no part that begins with Expected:")
    return made


def with_card(text: str, made: Mapping[str, Any]) -> str:
    """An experiment file's text with the card as its last key."""
    body = text.partition('  "expected": {')[0].rstrip().removesuffix("}").rstrip().rstrip(",")
    curves = [f'      "{seed}": {json.dumps(curve)}' for seed, curve in made["top1_curve"].items()]
    parts = [f'    "{key}": {json.dumps(made[key])}' for key in ("weights", "settings", "tolerance")]
    parts.append('    "top1_curve": {\n' + ",\n".join(curves) + "\n    }")
    return body + ',\n  "expected": {\n' + ",\n".join(parts) + "\n  }\n}\n"


def kept() -> list[Run]:
    return [json.loads(line) for line in KEPT.read_text(encoding="utf-8").splitlines()] if KEPT.is_file() else []


def replaced(readme: str) -> str:
    """README.md with the tables of the kept runs between their markers."""
    for name, text in (("leaderboard", table(kept())), ("departures", departures(kept()))):
        begin, end = f"<!-- {name}: {MADE} -->", f"<!-- end of {name} -->"
        head, found, rest = readme.partition(begin)
        if not found or end not in rest:
            raise ValueError(f"README.md lacks {begin} or {end}")
        readme = f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
    return readme


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--files", action="store_true", help="write the sweep files")
    ask.add_argument("--collect", type=Path, metavar="OUT", help="take in the finished runs; write table and cards")
    args = ask.parse_args()
    if args.files:
        for name in SETS:
            text = json.dumps(sweep_file(name), indent=2, ensure_ascii=False)
            (ROOT / "exps" / f"leaderboard_{name}.json").write_text(text + "\n", encoding="utf-8")
    if args.collect:
        runs = collect(args.collect, kept())
        KEPT.write_text("".join(json.dumps(run) + "\n" for run in runs), encoding="utf-8")
        for name in (*SETS, *ALONE):
            for method in shipped(name):
                path = path_of(name, method)
                if own := [r for r in runs if (r["set"], r["method"]) == (name, method)]:
                    text = path.read_text(encoding="utf-8")
                    text = with_figures(text, own) if name in SETS else text
                    path.write_text(with_card(text, card(own)), encoding="utf-8")
        readme = ROOT / "README.md"
        readme.write_text(replaced(readme.read_text(encoding="utf-8")), encoding="utf-8")
    print(table(kept()))


if __name__ == "__main__":
    main()
