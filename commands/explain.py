"""`--explain RUN`: what happened in a finished run, task by task, in plain sentences.

Every sentence comes from numbers of results.json and metrics.jsonl alone; nothing is computed anew. Accuracies in percent.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from commands import explain_measures
from utils.report import class_names
from utils.report import results as report_results
from utils.text import clock, counted, number, printable

Results = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]
PHASES = {
    "rd": "the descriptors",
    "recalibrate": "the head anew",
    "adapt": "adapters, with a head for this task alone",
    "align": "the head, on features drawn from class Gaussians",
}
SEMA = {"func": "adapters, router and head"}  # other methods train other things under that name


def run(args: argparse.Namespace) -> int:
    folder: Path = args.explain
    results, environment = report_results.read(folder, "results.json"), report_results.read(folder, "environment.json")
    rows = report_results.load_rows(folder / "metrics.jsonl")
    try:
        print(printable(explain(results, environment, rows)))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{folder}: its results are not as this program writes them ({error})") from None
    return 0


def explain(results: Results, environment: Mapping[str, Any], rows: Rows) -> str:
    """A paragraph on the run, one for each task, and one on the end."""
    tasks = [_task(results, [r for r in rows if r.get("task") == t], t) for t in range(len(results["top1_curve"]))]
    parts = [_begin(results, environment), *tasks, _end(results)]
    return "\n\n".join(" ".join(sentences) for sentences in parts)


def _begin(results: Results, environment: Mapping[str, Any]) -> list[str]:
    sizes = [len(ids) for ids in results["task_classes"]]
    backbone = environment.get("backbone") or {}
    seconds = sum(sum(entry.values()) for entry in results["seconds"])
    text = [
        f"{results['model_name']} learned the {counted(sum(sizes), 'class', 'classes')} of {results['dataset']} "
        f"in {counted(len(sizes), 'task')} "
        f"(seed {results['seed']}) in {clock(seconds)} on {environment.get('device_name') or environment.get('device')}."
    ]
    if backbone:
        text.append(f"Its backbone is {backbone.get('tag')}, weights {backbone.get('weight_hash')}.")
    return text


def _task(results: Results, rows: Rows, t: int) -> list[str]:
    new = results["task_classes"][t]
    classes = class_names.listed(new, class_names.of_results(results))
    return [
        f"Task {t + 1} brought {'class' if len(new) == 1 else 'classes'} {classes}.",
        *_novelty(rows),
        *_growth(rows),
        *_training(rows, PHASES | (SEMA if results["model_name"] == "sema" else {})),
        *_competition(results, t),
        *_merging(rows),
        *_experts(rows),
        *_scores(results, t),
    ]


def _training(rows: Rows, words: Mapping[str, str]) -> Iterator[str]:
    """How far each kind of phase brought its loss: "func 1" and "func 2" are two rounds of func."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "epoch":
            kinds.setdefault(row["phase"].split()[0], []).append(row)
    for kind, epochs in kinds.items():
        what, rounds = f" ({words[kind]})" if kind in words else "", len({row["phase"] for row in epochs})
        in_rounds = f" in {rounds} rounds" if rounds > 1 else ""
        yield (
            f"Phase {kind}{what} ran {counted(len(epochs), 'epoch')}{in_rounds}: the loss went from {epochs[0]['loss']:.3g} to "
            f"{epochs[-1]['loss']:.3g}."
        )


def _growth(rows: Rows) -> Iterator[str]:
    """SEMA's scans: which layers grew, or how far the highest score stayed below the threshold."""
    scans = [row for row in rows if row["kind"] == "detect"]
    if not scans:
        return
    grown = [row for row in scans if row["expanded"]]
    if grown:
        layers = ", ".join(f"layer {row['layer']} (scores {', '.join(map(_score, row['scores']))})" for row in grown)
        yield (
            f"In the scan for shift every adapter's score passed the threshold {grown[0]['threshold']:g} at {layers}: "
            f"{counted(len(grown), 'adapter')} joined there."
        )
    else:
        # a layer grows where all its adapters find the task strange, so its lowest score decides
        nearest = max(scans, key=lambda row: _lowest(row["scores"]))
        yield (
            f"In the scan for shift no layer grew: the nearest was layer {nearest['layer']}, where an adapter's score is "
            f"{number(_lowest(nearest['scores']))} and the threshold {nearest['threshold']:g}."
        )


def _score(value: float | None) -> str:
    """None is what the log has where a descriptor's record has no deviation to divide by."""
    return "not finite" if value is None else number(value)


def _lowest(scores: Sequence[float | None]) -> float:
    return min((s for s in scores if s is not None), default=0.0)


def _novelty(rows: Rows) -> Iterator[str]:
    for row in rows:
        if row["kind"] != "novelty":
            continue
        if row.get("best") is None:
            yield f"There was no expert yet, so expert {row['skill']} was added for it."
            continue
        against = "" if row["threshold"] is None else f", the threshold {number(row['threshold'], 3)}"
        outcome = f"it got the new expert {row['skill']}" if row["spawn"] else f"expert {row['skill']} went on with it"
        yield (
            f"Its similarity to what is known is {number(row['best'], 3)}{against}: {outcome} (decided by {row['reason']})."
        )


def _competition(results: Results, t: int) -> Iterator[str]:
    for entry in results.get("selection_history") or ():
        if entry.get("task") == t and "winner" in entry and "accuracies" in entry:
            others = [a for k, a in enumerate(entry["accuracies"]) if k != entry["winner"]]
            where = "TEST data" if entry["split"] == "test" else f"{entry['samples']} {entry['split']} images"
            best = entry["accuracies"][entry["winner"]]
            if not others:
                yield f"Its one expert scored {number(best)} on {where}."
                continue
            tied = ", the lower loss deciding" if best in others else ""
            yield (
                f"Expert {entry['winner']} won on {where} with {number(best)} (the others: "
                f"{', '.join(map(number, others))}){tied}."
            )


def _merging(rows: Rows) -> Iterator[str]:
    """What was merged, pair by pair of levels, from fast down: with two levels fast into slow alone."""
    every = [row for row in rows if row["kind"] == "consolidation"]
    top = max((row.get("level", 1) for row in every), default=1)
    for level in range(top, 0, -1):
        merges = [row for row in every if row.get("method") and row.get("level", 1) == level]
        if not merges:
            continue
        shares = [row["fast_share"] for row in merges if row.get("fast_share") is not None]
        layers = len({row["layer"] for row in merges})
        upper = "Fast" if level == top else f"Level {level}"
        text = (
            f"{upper} was merged into {'slow' if level == 1 else f'level {level - 1}'} by {merges[0]['method']} "
            f"(alpha {merges[0]['alpha']:g}) in {counted(layers, 'layer')}"
        )
        if shares:
            text += f"; {upper.lower()} gave {number(100 * sum(shares) / len(shares), 0)} % of the adapters' output"
        yield text + "."


def _experts(rows: Rows) -> Iterator[str]:
    """What became of experts that come and go: more rank, frozen for good, merged away, images stored for them."""
    for row in rows:
        if row["kind"] == "rank":
            what = f"its held-out loss went from {row['before']:.3g} to {row['after']:.3g}"
            yield f"Expert {row['expert']} stalled and grew to rank {row['rank']}: {what}."
        elif row["kind"] == "freeze" and row["converged"]:
            learned = ", ".join(map(str, row["learned"]))
            many = len(row["learned"]) > 1
            yield f"The loss reached a plateau: expert{'s' * many} {learned} {'are' if many else 'is'} frozen for good."
        elif row["kind"] == "merge":
            yield f"Expert {row['expert']} was hardly used and joined expert {row['into']}."
        elif row["kind"] == "replay":
            yield f"{counted(row['added'], 'image')} of it were stored for replay, {row['kept']} in all."


def _scores(results: Results, t: int) -> Iterator[str]:
    row, sizes = results["accuracy_matrix"][t], [len(ids) for ids in results["task_classes"]]
    seen = sum(sizes[: t + 1])
    if t == 0:
        yield f"It then knew {number(results['top1_curve'][0])} % of the test images."
        return
    yield (
        f"Over all {seen} classes seen it then scored {number(results['top1_curve'][t])} % "
        f"({number(results['top1_curve'][t - 1])} before): {number(row[t])} on the new ones."
    )
    before = results["accuracy_matrix"][t - 1]
    losses = [(before[k] - row[k], k) for k in range(t) if before[k] is not None and row[k] is not None]
    if losses and (worst := max(losses))[0] > 0:
        yield f"Task {worst[1] + 1} lost most, {number(worst[0])} points, and stands at {number(row[worst[1]])}."
    elif losses:
        yield "No earlier task lost anything."


def _end(results: Results) -> list[str]:
    last, known = results["last_accuracy"], results["task_oracle_accuracy"]
    text = [f"At the end: last accuracy {number(last)}, average {number(results['average_accuracy'])}"]
    if results["forgetting"] is not None:
        text[0] += f", forgetting {number(results['forgetting'])}"
    text[0] += "."
    if last is not None and known is not None and last < 100:
        between = known - last
        text.append(
            f"Of the {number(100 - last)} points that lack, {number(between)} are confusions between tasks (with the task "
            f"known it scores {number(known)}) and {number(100 - known)} within a task."
        )
    text += explain_measures.sentences(results)
    peeked = any(entry.get("split") == "test" for entry in results.get("selection_history") or ())
    text.append(
        f"Test data were scored {results['test_evaluations']} times"
        + (
            ", and something was SELECTED on them: the numbers are optimistic."
            if peeked
            else ", nothing was selected on them."
        )
    )
    return text
