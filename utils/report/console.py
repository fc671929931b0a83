"""What a run leaves behind as data and text: its record, results.json, the console's banner and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from utils.evaluation import metrics
from utils.report import class_names
from utils.run.record import RunRecord, results_json
from utils.text import WIDTH, clock, counted, number

if TYPE_CHECKING:
    from utils.data.tasks import TaskStream


def _block(label: str, text: str, indent: int = 12) -> list[str]:
    lines = wrap(text, WIDTH - indent, break_long_words=False, break_on_hyphens=False) or [""]
    return [f"{label if i == 0 else '':<{indent}}{line}".rstrip() for i, line in enumerate(lines)]


def banner(
    *,
    method: str,
    data: str,
    backbone: str,
    weights: str,
    device: str,
    seeds: Iterable[int],
    trainable: int | None,
    total: int,
    folder: Path,
) -> str:
    """Start of a run: what is trained on what, with which weights (name and hash), where, and where it is written.

    `trainable` parameters of the first task, None if the method does not say."""
    if trainable is None:
        parameters = f"{total:,}; how many of them are trained is not known before training"
    else:
        parameters = f"{trainable:,} of {total:,} trainable" + (f" ({100 * trainable / total:.2f} %)" if total else "")
    lines = [
        *_block("method", method),
        *_block("data", data),
        *_block("backbone", f"{backbone}, weights {weights}"),
        *_block("device", device),
        *_block("seeds", " ".join(str(seed) for seed in seeds)),
        *_block("parameters", parameters),
        f"{'run folder':<12}{folder}",
    ]
    return "\n".join(["=" * WIDTH, *lines, "=" * WIDTH])


def run_banner(cfg: Any, stream: TaskStream, learner: Any, facts: Any, device: Any, folder: Path) -> str:
    """The banner of a run, from its settings, tasks, learner and the facts of its backbone (`weights.BackboneFacts`)."""
    planned = learner.planned_parameters()
    texts = class_names.labels(stream.original_names(), len(stream.order))
    arriving = "" if class_names.are_numbers(texts) else f": {class_names.listed(stream.order, texts)}"
    return banner(
        method=f"{cfg.model_name}  {cfg.prefix}".rstrip(),
        data=f"{cfg.dataset}, {counted(len(stream.order), 'class', 'classes')} in {counted(len(stream), 'task')} of "
        f"{'+'.join(map(str, stream.sizes))}{arriving}",
        backbone=f"{cfg.backbone_type} ({facts.tag}, {facts.image_size} px)",
        weights=f"{facts.source}, hash {facts.weight_hash}",
        device=str(device),
        seeds=cfg.seed,
        trainable=(planned[0][1] if planned else 0) if learner.says_what_it_trains else None,
        total=sum(p.numel() for p in learner.parameters()),
        folder=folder,
    )


def task_table(record: RunRecord, names: Sequence[str] | None = None) -> str:
    """After a task: accuracy (percent) on every task so far, last, average, forgetting, adapters per layer.

    `names` of the original classes: where they are more than numbers, those of the task's classes are shown."""
    results, t = results_json(record), len(record.correct)
    row, layers = results["accuracy_matrix"][-1], record.adapters_per_layer[-1]
    classes = [len(ids) for ids in record.task_classes]
    head = (
        f"after task {t}/{len(classes)}: {counted(classes[t - 1], 'new class', 'new classes')}, {sum(classes[:t])} seen"
    )
    lines = [f"{head}, {clock(sum(record.seconds[-1].values()))}"]
    texts = class_names.labels(names, len(record.class_order))
    if not class_names.are_numbers(texts):
        lines += _block("  classes", class_names.listed(record.task_classes[t - 1], texts))
    per_line = (WIDTH - 12) // 7
    for first in range(0, t, per_line):
        some = range(first, min(first + per_line, t))
        lines.append(f"{'  task':<12}" + "".join(f"{k + 1:>7}" for k in some))
        lines.append(f"{'  accuracy':<12}" + "".join(f"{number(row[k]):>7}" for k in some))
    titles = {"last_accuracy": "last", "average_accuracy": "average", "forgetting": "forgetting"}
    lines.append("  " + "   ".join(f"{name} {number(results[key])}" for key, name in titles.items()))
    if any(layers.values()):
        counts = ", ".join(
            f"layer\u00a0{layer}:\u00a0{n}" for layer, n in layers.items() if n
        )  # wrap between layers only
        lines += [line.replace("\u00a0", " ") for line in _block("  adapters", counts)]
    return "\n".join(lines)


def again_table(samples: Sequence[int], then: Sequence[int], now: Sequence[int]) -> str:
    """A saved model scored again: right answers on each task's test images as recorded and now, and whether all are equal."""
    lines = [f"{'task':<6}{'images':>8}{'recorded':>10}{'now':>8}{'percent':>10}"]
    for task, (n, old, new) in enumerate(zip(samples, then, now, strict=True), start=1):
        mark = "" if old == new else "   differs"
        lines.append(f"{task:<6}{n:>8}{old:>10}{new:>8}{number(100 * new / n if n else None):>10}{mark}")
    n, old, new = sum(samples), sum(then), sum(now)
    lines.append(f"{'all':<6}{n:>8}{old:>10}{new:>8}{number(100 * new / n if n else None):>10}")
    return "\n".join(lines)


SEED_COLUMNS = {
    "last_accuracy": "last",
    "average_accuracy": "average",
    "final_task_mean": "task mean",
    "forgetting": "forgetting",
    "backward_transfer": "transfer",
    "task_oracle_accuracy": "task known",
}


def seed_table(results: Sequence[Mapping[str, Any]], folder: Path | None = None) -> str:
    """End of a run: one line a seed (percent), then mean, standard deviation (divisor n-1), n; with `folder`, for one seed, the
    paths of its report and of the run folder."""
    if not results:
        return "no finished seeds"
    first = results[0]
    tasks = len(first["task_classes"])
    names = f"{first['model_name']} on {first['dataset']}, {counted(tasks, 'task')} (percent)"
    lines = [*_block("", names, 0), f"{'seed':<12}" + "".join(f"{title:>12}" for title in SEED_COLUMNS.values())]
    lines[-1] += f"{'time':>12}"
    for result in results:
        spent = sum(sum(entry.values()) for entry in result["seconds"])
        cells = "".join(f"{number(result[key]):>12}" for key in SEED_COLUMNS)
        lines.append(f"{result['seed']!s:<12}{cells}{clock(spent):>12}")
    summaries = [metrics.summarise(result[key] for result in results) for key in SEED_COLUMNS]
    lines.append("-" * (12 * (len(SEED_COLUMNS) + 2)))
    lines.append(f"{'mean':<12}" + "".join(f"{number(s.mean):>12}" for s in summaries))
    lines.append(f"{'std':<12}" + "".join(f"{number(s.std):>12}" for s in summaries))
    lines.append(f"{'n':<12}" + "".join(f"{s.n:>12}" for s in summaries))
    if folder is not None:
        page = folder / f"seed_{first['seed']}" / "report.html"
        lines += [f"report: {page}", f"run folder: {folder}"]
    return "\n".join(lines)
