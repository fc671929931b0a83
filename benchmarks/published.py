"""Published settings against published numbers: `python -m benchmarks.published --data-root DIR`, with real images and weights.

Runs SimpleCIL, RanPAC, SLCA, SEMA, nested_lora and moe_parallel with their files in exps/ on CIFAR-100 and ImageNet-R (10 tasks
each), and writes beside the runs: a card for each file (`cards/`, as the key `expected` of an experiment file), `runs.jsonl`
with the numbers of every seed, and `published.md`, the table of published and measured accuracies. Finished runs are not
repeated: the same command goes on after an interruption, and after the last run writes cards and table again.

`--set KEY=VALUE` reaches every run, `--set METHOD:KEY=VALUE` those of one method, e.g. for a folder of images that stands in
for both sets; the table then says so and names no difference. Published numbers with their sources: published_numbers.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import leaderboard
from commands import load, options, verify
from main import main as run_program
from utils.config.resolve import Resolved
from utils.evaluation.metrics import Summary, summarise
from utils.files import storage
from utils.report import results as report_results
from utils.text import markdown, number

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = Path(__file__).with_name("published_numbers.json")
METHODS = ("simplecil", "ranpac", "slca", "sema", "nested_lora", "moe_parallel")
SETS = {"cifar": "CIFAR-100", "inr_10task": "ImageNet-R"}  # end of the file's name: what a table calls the set
# keys of --set that leave a run comparable with the published one
SAME = ("seed", "device", "precision", "num_workers", "data_root", "eval_batch_size", "prefix_cache", "prefix_cache_gb")
Run = dict[str, Any]


def changes_of(method: str, args: argparse.Namespace) -> list[str]:
    """The keys that the command line changes in the runs of a method, KEY=VALUE each."""
    changes = []
    for change in args.set:
        of, _, rest = change.partition(":")
        if of in METHODS:
            changes += [rest] * (of == method)
        else:
            changes.append(change)
    changes += [f"backbone_weights={args.weights}"] if args.weights else []
    return changes + ([f"seed={json.dumps(args.seeds)}"] if args.seeds else [])


def arguments(path: Path, method: str, args: argparse.Namespace) -> list[str]:
    """What main.py is started with for one experiment file."""
    words = ["--config", str(path), "--out", str(args.out)]
    words += ["--data-root", args.data_root] if args.data_root else []
    words += ["--device", args.device] if args.device else []
    return [*words, *(word for change in changes_of(method, args) for word in ("--set", change))]


def resolved(words: Sequence[str]) -> Resolved:
    """The checked experiment that these arguments of main.py stand for. Raises ConfigError with every fault."""
    return load.load(options.parse(words, about="")).cells[0].resolved


def collect(name: str, method: str, experiment: Resolved, out: Path, path: Path) -> list[Run]:
    """The finished runs of one experiment, a seed each."""
    runs = []
    for folder in sorted((out / path.stem / experiment.hash).glob("seed_*")):
        if not (folder / "results.json").is_file():
            continue
        settings, results, machine = (
            report_results.read(folder, file) for file in ("config.json", "results.json", "environment.json")
        )
        runs.append(
            {
                "set": name, "method": method, "seed": results["seed"], "settings": verify.digest(settings),
                "weights": machine["backbone"]["weight_hash"], "commit": (machine["git"] or {}).get("commit"),
                "head": settings["head"], "top1_curve": [round(a, 2) for a in results["top1_curve"]],
                "last": round(results["last_accuracy"], 2), "average": round(results["average_accuracy"], 2),
                "forgetting": results["forgetting"] and round(results["forgetting"], 2),
                "seconds": round(sum(sum(task.values()) for task in results["seconds"]), 1),
            }
        )  # fmt: skip
    return runs


def comparable(changes: Iterable[str]) -> bool:
    """Whether runs with these changes of keys are still the published experiments; weights from a file count as theirs."""
    return all(change.partition("=")[0] in (*SAME, "backbone_weights") for change in changes)


def table(runs: Sequence[Run], published: Sequence[Mapping[str, Any]], sets: Sequence[str], same: bool) -> str:
    """A Markdown row a set and method: published last and average accuracy, ours as mean ± std over n seeds, the difference of
    the last accuracy if the runs are the `same` experiment, and where the published numbers come from."""
    lines = [
        "| set | method | published last | published average | ours last | ours average | difference | n | source |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name in sets:
        for method in METHODS:
            group = [run for run in runs if (run["set"], run["method"]) == (name, method)]
            theirs = [row for row in published if (row["set"], row["method"]) == (name, method)] or [{}]
            last, average = (summarise(run[key] for run in group) for key in ("last", "average"))
            for row in theirs:
                known = row.get("last")
                gap = "-" if not same or known is None or last.mean is None else f"{last.mean - known:+.2f}"
                source = markdown(f"{row['source']}; {row['weights']}") if row else "no number is published"
                lines.append(
                    f"| {SETS[name]} | `{method}` | {_plain(known)} | {_plain(row.get('average'))} | {_spread(last)} | "
                    f"{_spread(average)} | {gap} | {last.n} | {source} |"
                )
    return "\n".join(lines)


def _plain(value: float | None) -> str:
    return "-" if value is None else number(value, 2)


def _spread(values: Summary) -> str:
    if values.mean is None:
        return "not run"
    return number(values.mean, 2) + (f" ± {number(values.std, 2)}" if values.std is not None else "")


def page(runs: Sequence[Run], args: argparse.Namespace) -> str:
    """published.md: the table, and what was changed."""
    same = all(comparable(changes_of(method, args)) for method in args.methods)
    note = "Accuracy in percent over all classes after the last task, and its mean over tasks (`average`)."
    if not same:
        keys = ", ".join(f"`{markdown(change)}`" for change in args.set)
        note += f" These runs are not the published experiments, since these keys were set: {keys}."
    numbers = json.loads(NUMBERS.read_text(encoding="utf-8"))["numbers"]
    return f"# Published against ours\n\n{note}\n\n{table(runs, numbers, args.sets, same)}\n"


def main(argv: Sequence[str] | None = None) -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--data-root", metavar="DIR", help="folder with CIFAR-100 and ImageNet-R")
    ask.add_argument("--weights", metavar="FILE", help="file of ViT-B/16 weights (default: those the files name)")
    ask.add_argument("--out", type=Path, default=Path("logs/published"), metavar="DIR", help="runs, cards and table")
    ask.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    ask.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="default: both")
    ask.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all six")
    ask.add_argument("--seeds", type=int, nargs="+", metavar="N", help="default: those of the files")
    ask.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key in every run; METHOD:KEY=VALUE in those of one method",
    )
    args = ask.parse_args(argv)
    runs: list[Run] = []
    code = 0
    for name in args.sets:
        for method in args.methods:
            path = ROOT / "exps" / f"{method}_{name}.json"
            words = arguments(path, method, args)
            if code != 75:  # interrupted: what is finished is still collected
                code = max(code, run_program(words))
            try:
                experiment = resolved(words)
            except ValueError:  # run_program has said why
                continue
            of_file = collect(name, method, experiment, args.out, path)
            if of_file:
                card = {"file": path.name, "commits": sorted({str(run["commit"]) for run in of_file})}
                text = json.dumps(card | leaderboard.card(of_file), indent=1)
                (args.out / "cards").mkdir(parents=True, exist_ok=True)
                storage.write_bytes(args.out / "cards" / path.name, f"{text}\n".encode())
            runs += of_file
    if runs:
        storage.write_bytes(args.out / "runs.jsonl", "".join(f"{json.dumps(run)}\n" for run in runs).encode())
    text = page(runs, args)
    args.out.mkdir(parents=True, exist_ok=True)
    storage.write_bytes(args.out / "published.md", text.encode())
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
