"""compare.html: gathers the values of several runs side by side that templates/compare.html shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from utils.compare import intransigence
from utils.compare import plots as plots_compare
from utils.compare import table as comparison
from utils.compare.reports import report_table, reports_of
from utils.compare.rows import Arm, differences
from utils.evaluation import metrics
from utils.evaluation.error_parts import Split
from utils.report import plots
from utils.report.html import (
    Block,
    Lines,
    Link,
    Note,
    Section,
    Table,
    Two,
    as_text,
    facts,
    figure_sections,
    flat,
    folded,
    render,
)
from utils.report.tables import again
from utils.run.record import PHASES
from utils.text import counted, number, shortened

MOST_DETAILED = 24  # rows whose settings, environments and commands are shown
MOST_DRAWN = len(plots_compare.PALETTE)
MOST_READ = 50  # environments of a row
MOST_COMMANDS = 5  # of a row, where they differ between seeds, as in a sweep; and seeds whose classes are named

FIGURES = {  # name: heading, caption
    "accuracy": ("Accuracy", "Test accuracy over all classes seen so far, after each task."),
    "forgetting": (
        "Forgetting",
        "For each task but the last: its best accuracy after an earlier task minus the one at the end, in points.",
    ),
    "errors": (
        "What the errors are",
        "Of the finished models, all test images. Within-task error: wrong even if the task were known. Task confusion: "
        "right then, but a class of another task scores higher.",
    ),
    "bias": (
        "Head bias",
        "Of the test images taken for another task's class: the share on newer tasks than their own minus the share on older "
        "ones, in percent. 100: all errors between tasks fall on newer ones, 0: as many on older ones. Left out are rows "
        "without such errors, and runs of versions that did not count them.",
    ),
    "adapters": ("Adapters", "Adapters in place after each task."),
    "cost": (
        "Time and memory",
        "Seconds of each task, training, detection and evaluation together, and the largest memory of the process up to its "
        "end. Times compare only on equal machines with equal load.",
    ),
}
Numbered = Sequence[tuple[int, Arm]]


def chosen(rows: Sequence[Arm], most: int) -> list[tuple[int, Arm]]:
    """At most `most` rows with their numbers from 1: the first and, of more, those with the best last accuracy."""
    numbered = list(enumerate(rows, start=1))

    def rank(pair: tuple[int, Arm]) -> float:
        mean = metrics.mean(run.results["last_accuracy"] for run in pair[1].runs.values())
        return float("-inf") if mean is None else mean

    best = sorted(numbered[1:], key=rank, reverse=True)[: most - 1]
    return sorted([*numbered[:1], *best], key=lambda pair: pair[0])


def _with_deviation(summary: metrics.Summary, digits: int = 2) -> str:
    """Mean ± std, without the latter for one seed, `-` without values."""
    return number(summary.mean, digits) + ("" if summary.std is None else f" ± {number(summary.std, digits)}")


def _spread(values: Sequence[float | None], digits: int = 2) -> str:
    return _with_deviation(metrics.summarise(values), digits)


def _of_rows(rows: Numbered, head: Sequence[str], cells: Any) -> Table:
    """A table with a line a row: its number and label, then `cells(runs' results)`."""
    body = [[f"{n}: {row.label}", *cells([run.results for run in row.runs.values()])] for n, row in rows]
    return Table(["row", *head], body, "rows")


def result_table(rows: Sequence[comparison.TableRow], reports: Mapping[int, str] = MappingProxyType({})) -> list[Block]:
    """All rows: for each column mean ± std, the best in bold, and below it the paired difference to the first row. `reports`:
    by the index of a row the path that its name leads to."""
    columns = comparison.columns_of(rows)
    winners = {c.key: comparison.best(rows, c) for c in columns}
    body = []
    for index, row in enumerate(rows):
        n, pairs = comparison.counts(row)
        name = Link(row.shown, reports[index]) if index in reports else row.shown
        cells: list[Any] = [name, n if pairs in (None, n) else Two(str(n), counted(pairs or 0, "pair"))]
        for c in columns:
            gap, below = row.differences[c.key], ""
            if gap is not None and gap.mean is not None:
                ends = f" {comparison.interval(gap)}" if gap.low is not None else ""
                below = comparison.signed(gap.mean) + ends
            cells.append(Two(c.spread(row.summaries[c.key]), below, index in winners[c.key]))
        body.append(cells)
    text = f"In {comparison.LEGEND}, below each mean; {comparison.IN_BOLD}."
    return [Table(["row", "n", *(c.title for c in columns)], body, "rows cards"), Note(text)]


def settings_table(rows: Numbered) -> list[Block]:
    """The settings in which these rows differ, a line a key. Folded away are those that only some methods have but that are
    equal among them, and those that are equal in all."""
    apart = differences([row for _, row in rows])
    lone = {
        k: v for k, v in apart.items() if len({as_text(value) for value in v if value is not None}) == 1 and None in v
    }
    lone = {k: v for k, v in lone.items() if not all(k in row.settings for _, row in rows)}  # null may be a value

    def lines(keys: Mapping[str, Sequence[Any]]) -> Table:
        cells = [[k, *(as_text(row.settings[k]) if k in row.settings else "-" for _, row in rows)] for k in keys]
        return Table(["key", *(f"row {n}" for n, _ in rows)], cells, "names across")

    main = {key: values for key, values in apart.items() if key not in lone}
    blocks: list[Block] = [lines(main) if main else Note("None that change a number.")]
    if lone:
        blocks += folded(f"{len(lone)} settings that only some of the methods have, equal in those", lines(lone))
    first = {
        k: v
        for k, v in rows[0][1].settings.items()
        if k not in apart and k not in ("seed", "about", "expected", "prefix")
    }
    equal = f"{len(first)} settings of row {rows[0][0]} that are equal in all or say where it ran"
    return [*blocks, *folded(equal, facts(first))]


def error_table(rows: Numbered) -> list[Block]:
    def cells(runs: Sequence[Mapping[str, Any]]) -> list[str]:
        last: list[Split] = [r["splits"][-1] for r in runs if r["splits"]]
        return [_spread([getattr(split, name) for split in last]) for name in Split._fields]

    head = ["accuracy", "task known (task-IL)", "task confusion", "within-task error", "head bias"]
    return [_of_rows(rows, head, cells)]


def forgetting_table(rows: Numbered) -> list[Block]:
    count = max(len(run.results["forgetting_by_task"]) for _, row in rows for run in row.runs.values())

    def cells(runs: Sequence[Mapping[str, Any]]) -> list[str]:
        columns = [[r["forgetting_by_task"][k] for r in runs if k < len(r["forgetting_by_task"])] for k in range(count)]
        return [_spread(column) for column in columns]

    if not count:
        return []
    return folded("Forgetting as numbers", _of_rows(rows, [f"task {k + 1}" for k in range(count)], cells))


def class_table(rows: Numbered) -> list[Block]:
    """Names of the classes of each task, a column a seed: of the seeds for which they are the same in all rows."""
    by_seed: dict[int, set[tuple[str, ...]]] = {}
    for _, row in rows:
        for run in row.runs.values():
            by_seed.setdefault(run.seed, set()).add(run.results["classes"])
    alike = {seed: next(iter(named)) for seed, named in by_seed.items() if len(named) == 1}
    columns = {seed: classes for seed, classes in list(alike.items())[:MOST_COMMANDS] if classes}
    if not columns:
        return []
    body = [[t, *cells] for t, cells in enumerate(zip(*columns.values(), strict=False), start=1)]
    return folded("Classes of each task", Table(["task", *(f"seed {s}" for s in columns)], body, "names across"))


def adapter_table(rows: Numbered) -> list[Block]:
    """Adapters in each layer at the end, means over seeds; empty without any."""
    layers = dict.fromkeys(layer for _, row in rows for run in row.runs.values() for layer in run.results["layers"])
    used = [n for n in layers if any(run.results["layers"].get(n) for _, row in rows for run in row.runs.values())]
    if not used:
        return []

    def cells(runs: Sequence[Mapping[str, Any]]) -> list[str]:
        of_layers = [_spread([r["layers"].get(layer, 0) for r in runs], 1) for layer in used]
        return [*of_layers, _spread([sum(r["layers"].values()) for r in runs], 1)]

    return [_of_rows(rows, [*(f"layer {layer}" for layer in used), "all"], cells)]


def cost_table(rows: Numbered) -> list[Block]:
    def cells(runs: Sequence[Mapping[str, Any]]) -> list[str]:
        def last(key: str) -> str:
            known = [r[key][-1] for r in runs if r[key]]
            low, high = (f"{f(known):,.0f}" if known else "-" for f in (min, max))
            return low if low == high else f"{low} to {high}"

        spent = [_spread([sum(entry.get(phase, 0.0) for entry in r["seconds"]) for r in runs], 1) for phase in PHASES]
        peak = _spread([r["peak_memory_bytes"] / 2**20 if r["peak_memory_bytes"] else None for r in runs], 0)
        speed = _spread([r["images_per_second"] for r in runs], 0)
        return [*spent, speed, peak, last("trainable_parameters"), last("total_parameters")]

    head = [
        *(f"{phase} (s)" for phase in PHASES),
        "training images/s",
        "peak (MiB)",
        "trained in the last task",
        "parameters",
    ]
    return [_of_rows(rows, head, cells)]


def _comparable(environment: Mapping[str, Any]) -> dict[str, str]:
    """Dotted names and texts; when and by which command a run was started is no difference of environments."""
    return flat({key: value for key, value in environment.items() if key not in ("time", "command")})


def environment_table(rows: Numbered, environments: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[Block]:
    """What differs between or within these rows; the rest folded away."""
    flats = {n: [_comparable(environment) for environment in environments[n]] for n, _ in rows}
    keys = dict.fromkeys(key for of_row in flats.values() for facts_of_run in of_row for key in facts_of_run)
    texts = {key: [" / ".join(dict.fromkeys(f.get(key, "-") for f in flats[n])) for n, _ in rows] for key in keys}
    apart = {key: values for key, values in texts.items() if len(set(values)) > 1 or " / " in values[0]}
    differing: Block = Note("None: equal code, versions, weights and device.")
    if apart:
        head = ["fact", *(f"row {n}" for n, _ in rows)]
        differing = Table(head, [[key, *values] for key, values in apart.items()], "names across")
    same = {key: values[0] for key, values in texts.items() if key not in apart}
    return [differing, *folded(f"{len(same)} facts that are equal in all", facts(same))]


def command_list(rows: Numbered, environments: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[Block]:
    """For each row its commands, in front of them the commit if it is another than the row's before."""
    blocks: list[Block] = []
    before: list[str] | None = None
    for n, row in rows:
        commands = dict.fromkeys(tuple(again(environment)) for environment in environments[n] if environment)
        lines: list[str] = []
        for known in list(commands)[:MOST_COMMANDS]:
            *setup, command = known
            if setup != before:
                lines += setup
            lines.append(command)
            before = setup
        if len(commands) > MOST_COMMANDS:
            lines.append(f"# and {len(commands) - MOST_COMMANDS} more, in environment.json of each seed")
        blocks += [Note(f"{n}: {row.label}"), Lines(lines or ["# not recorded"])]
    return blocks


def page(
    rows: Sequence[Arm],
    table: Sequence[comparison.TableRow],
    notes: Sequence[str],
    name: str = "",
    lead: str = "",
    place: Path | None = None,
) -> str:
    """The text of compare.html: `table` has a row for each of `rows`; `notes` say what to mind. `name` begins the title,
    `lead` is a sentence above the rest; `place`: the folder of the page, for links to the reports of the runs."""
    detailed, drawn = chosen(rows, MOST_DETAILED), chosen(rows, MOST_DRAWN)
    environments = {n: [run.environment() for run in list(row.runs.values())[:MOST_READ]] for n, row in detailed}
    count = sum(len(row.runs) for row in rows)
    title = f"{name}{': ' * bool(name)}{counted(count, 'run')} in {counted(len(rows), 'row')}"
    cut = []
    if len(drawn) < len(rows):
        cut.append(f"Drawn are {len(drawn)} of {len(rows):,} rows: the first and those with the best last accuracy.")
    if len(detailed) < len(rows):
        cut.append(
            f"Settings, environments and other tables show {len(detailed)} of {len(rows):,} rows, chosen in the same way."
        )
    reports = reports_of(rows, place)
    lone = {
        n: path
        for n, (row, paths) in enumerate(zip(rows, reports, strict=True))
        for path in paths.values()
        if len(row.runs) == 1
    }
    svgs = {name: plots.inline_svg(figure, f"compare_{name}") for name, figure in plots_compare.draw(drawn).items()}
    below = {
        "forgetting": forgetting_table(detailed),
        "errors": error_table(detailed),
    }
    return render(
        "compare.html",
        title=title,
        short_title=shortened(title, 100),
        notes=[*([Note(lead, "lead")] if lead else []), *(Note(note, "warn") for note in notes), *map(Note, cut)],
        sections=[
            Section(
                "Results", [*result_table(table, lone), *report_table(rows, reports), *class_table(detailed)], wide=True
            ),
            *figure_sections(FIGURES, svgs, below, {}),
            *[Section("Intransigence", blocks) for blocks in [intransigence.table(detailed)] if blocks],
            *(Section("Adapters by layer", blocks, wide=True) for blocks in [adapter_table(detailed)] if blocks),
            Section("Cost in numbers", cost_table(detailed), wide=True),
            Section("Settings that differ", settings_table(detailed), wide=True),
            Section("Environments that differ", environment_table(detailed, environments), wide=True),
            Section("Run it again", command_list(detailed, environments), wide=True),
        ],
    )
