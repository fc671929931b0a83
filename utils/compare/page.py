"""compare.html: several runs side by side in one file without links or scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from utils.compare import plots as plots_compare
from utils.compare import table as comparison
from utils.compare.rows import Arm, differences
from utils.evaluation import metrics
from utils.evaluation.error_parts import Split
from utils.report import plots
from utils.report.html import as_text, commands, details, document, facts, table
from utils.report.tables import again
from utils.run.record import PHASES
from utils.text import number, shortened

MOST_DETAILED = 24  # rows whose settings, environments and commands are shown
MOST_DRAWN = len(plots_compare.PALETTE)
MOST_READ = 50  # environments of a row
MOST_COMMANDS = 5  # of a row, where each seed had its own, as in a sweep

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


def _told(found: metrics.Summary, digits: int = 2) -> str:
    """Mean ± std, without the latter for one seed, `-` without values."""
    return number(found.mean, digits) + ("" if found.std is None else f" ± {number(found.std, digits)}")


def _spread(values: Sequence[float | None], digits: int = 2) -> str:
    return _told(metrics.summarise(values), digits)


def _of_rows(rows: Numbered, head: Sequence[str], cells: Any) -> str:
    """A table with a line a row: its number and label, then `cells(runs' results)`."""
    body = [[f"{n}: {row.label}", *cells([run.results for run in row.runs.values()])] for n, row in rows]
    return table(["row", *head], body, "rows")


def result_table(found: Sequence[comparison.TableRow]) -> str:
    """All rows: for each measure mean ± std, and the paired difference to the first row with its interval."""
    head, body = ["row", "n", "pairs"], []
    for name in comparison.COLUMNS.values():
        head += [name, "difference"]
    for row in found:
        gap = row.differences["last_accuracy"]
        line: list[Any] = [row.shown, row.summaries["last_accuracy"].n, gap.n if gap else "-"]
        for column in comparison.COLUMNS:
            gap = row.differences[column]
            spread = comparison.interval(gap) if gap and gap.low is not None else ""
            line += [_told(row.summaries[column]), f"{comparison.signed(gap.mean if gap else None)} {spread}".rstrip()]
        body.append(line)
    return table(head, body, "rows") + f'<p class="soft">In {escape(comparison.LEGEND)}.</p>'


def settings_table(rows: Numbered) -> str:
    """The settings in which these rows differ, a line a key. Folded away are those that only some methods have but that are
    equal among them, and those that are equal in all."""
    apart = differences([row for _, row in rows])
    lone = {
        k: v for k, v in apart.items() if len({as_text(value) for value in v if value is not None}) == 1 and None in v
    }
    lone = {k: v for k, v in lone.items() if not all(k in row.settings for _, row in rows)}  # null may be a value

    def lines(keys: Mapping[str, Sequence[Any]]) -> str:
        cells = [[k, *(as_text(row.settings[k]) if k in row.settings else "-" for _, row in rows)] for k in keys]
        return table(["key", *(f"row {n}" for n, _ in rows)], cells, "names across")

    main = {key: values for key, values in apart.items() if key not in lone}
    text = lines(main) if main else '<p class="soft">None that change a number.</p>'
    if lone:
        text += details(f"{len(lone)} settings that only some of the methods have, equal in those", lines(lone))
    first = {k: v for k, v in rows[0][1].settings.items() if k not in apart and k not in ("seed", "about", "prefix")}
    return text + details(
        f"{len(first)} settings of row {rows[0][0]} that are equal in all or say where it ran", facts(first)
    )


def error_table(rows: Numbered) -> str:
    def cells(runs: Sequence[Mapping[str, Any]]) -> list[str]:
        last: list[Split] = [r["splits"][-1] for r in runs if r["splits"]]
        return [_spread([getattr(split, name) for split in last]) for name in Split._fields]

    return _of_rows(rows, ["accuracy", "task known", "task confusion", "within-task error", "head bias"], cells)


def forgetting_table(rows: Numbered) -> str:
    count = max(len(run.results["forgetting_by_task"]) for _, row in rows for run in row.runs.values())

    def cells(runs: Sequence[Mapping[str, Any]]) -> list[str]:
        columns = [[r["forgetting_by_task"][k] for r in runs if k < len(r["forgetting_by_task"])] for k in range(count)]
        return [_spread(column) for column in columns]

    return _of_rows(rows, [f"task {k + 1}" for k in range(count)], cells) if count else ""


def adapter_table(rows: Numbered) -> str:
    """Adapters in each layer at the end, means over seeds; empty without any."""
    layers = dict.fromkeys(layer for _, row in rows for run in row.runs.values() for layer in run.results["layers"])
    used = [n for n in layers if any(run.results["layers"].get(n) for _, row in rows for run in row.runs.values())]
    if not used:
        return ""

    def cells(runs: Sequence[Mapping[str, Any]]) -> list[str]:
        own = [_spread([r["layers"].get(layer, 0) for r in runs], 1) for layer in used]
        return [*own, _spread([sum(r["layers"].values()) for r in runs], 1)]

    return _of_rows(rows, [*(f"layer {layer}" for layer in used), "all"], cells)


def cost_table(rows: Numbered) -> str:
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
    return _of_rows(rows, head, cells)


def _flat(environment: Mapping[str, Any]) -> dict[str, str]:
    """Dotted names and texts; when and by which command a run was started is no difference of environments."""
    flat = {}
    for key, value in environment.items():
        if key in ("time", "command"):
            continue
        for name, item in value.items() if isinstance(value, Mapping) else [("", value)]:
            flat[f"{key}.{name}" if name else key] = as_text(item)
    return flat


def environment_table(rows: Numbered, found: Mapping[int, Sequence[Mapping[str, Any]]]) -> str:
    """What differs between or within these rows; the rest folded away."""
    flats = {n: [_flat(environment) for environment in found[n]] for n, _ in rows}
    keys = dict.fromkeys(key for own in flats.values() for flat in own for key in flat)
    texts = {key: [" / ".join(dict.fromkeys(flat.get(key, "-") for flat in flats[n])) for n, _ in rows] for key in keys}
    apart = {key: own for key, own in texts.items() if len(set(own)) > 1 or " / " in own[0]}
    if apart:
        head = ["fact", *(f"row {n}" for n, _ in rows)]
        text = table(head, [[key, *own] for key, own in apart.items()], "names across")
    else:
        text = '<p class="soft">None: equal code, versions, weights and device.</p>'
    same = {key: own[0] for key, own in texts.items() if key not in apart}
    return text + details(f"{len(same)} facts that are equal in all", facts(same))


def command_list(rows: Numbered, found: Mapping[int, Sequence[Mapping[str, Any]]]) -> str:
    """For each row its commands, in front of them the commit if it is another than the row's before."""
    parts, before = [], None
    for n, row in rows:
        blocks = dict.fromkeys(tuple(again(environment)) for environment in found[n] if environment)
        lines = []
        for block in list(blocks)[:MOST_COMMANDS]:
            *setup, command = block
            if setup != before:
                lines += setup
            lines.append(command)
            before = setup
        if len(blocks) > MOST_COMMANDS:
            lines.append(f"# and {len(blocks) - MOST_COMMANDS} more, in environment.json of each seed")
        parts.append(f'<p class="soft">{escape(f"{n}: {row.label}")}</p>' + commands(lines or ["# not recorded"]))
    return "".join(parts)


def page(rows: Sequence[Arm], found: Sequence[comparison.TableRow], notes: Sequence[str]) -> str:
    """The text of compare.html: `found` are the table's rows, one for each of `rows`; `notes` what to mind."""
    detailed, drawn = chosen(rows, MOST_DETAILED), chosen(rows, MOST_DRAWN)
    environments = {n: [run.environment() for run in list(row.runs.values())[:MOST_READ]] for n, row in detailed}
    count = sum(len(row.runs) for row in rows)
    title = f"{count:,} run{'s' * (count != 1)} in {len(rows):,} row{'s' * (len(rows) != 1)}"
    cut = []
    if len(drawn) < len(rows):
        cut.append(f"Drawn are {len(drawn)} of {len(rows):,} rows: the first and those with the best last accuracy")
    if len(detailed) < len(rows):
        cut.append(
            f"Settings, environments and other tables show {len(detailed)} of {len(rows):,} rows, chosen in the same way"
        )
    svgs = {name: plots.inline_svg(figure, f"compare_{name}") for name, figure in plots_compare.draw(drawn).items()}
    after = {
        "forgetting": details("Forgetting as numbers", forgetting_table(detailed)),
        "errors": error_table(detailed),
        "adapters": adapter_table(detailed),
        "cost": cost_table(detailed),
    }
    parts = [
        f"<h1>{escape(title)}</h1>",
        *(f'<p class="warn">{escape(note)}</p>' for note in notes),
        *(f'<p class="soft">{escape(text)}.</p>' for text in cut),
        "<h2>Results</h2>",
        result_table(found),
        "<h2>Settings that differ</h2>",
        settings_table(detailed),
    ]
    for name, (heading, caption) in FIGURES.items():
        if name not in svgs and not after.get(name):
            continue
        parts.append(f"<h2>{heading}</h2>")
        if name in svgs:
            parts += [f"<figure>{svgs[name]}</figure>", f'<p class="soft">{escape(caption, quote=False)}</p>']
        parts.append(after.get(name, ""))
    parts += ["<h2>Environments that differ</h2>", environment_table(detailed, environments)]
    parts += ["<h2>Run it again</h2>", command_list(detailed, environments)]
    return document(shortened(title, 100), parts)
