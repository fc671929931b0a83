"""Classes as tables and sentences show them: by their names, or by their numbers where the data set has no other names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from utils.text import one_line

LONGEST = 24  # characters of a name among others; the middle of a longer one is left out


def labels(names: Sequence[str] | None, count: int) -> list[str]:
    """A text for each of `count` original classes: its name, safe for a terminal and short enough for a list, or its number.

    `names` in the order of the original classes; None and names of another number of classes give numbers."""
    if names is None or len(names) != count:
        return [str(c) for c in range(count)]
    return [_short(one_line(str(name)).strip()) or str(c) for c, name in enumerate(names)]


def of_results(results: Mapping[str, Any]) -> list[str]:
    """The labels of the classes of a results.json; those of older versions have no names."""
    return labels(
        results.get("class_names"), 1 + max((c for classes in results["task_classes"] for c in classes), default=-1)
    )


def are_numbers(texts: Sequence[str]) -> bool:
    """Whether the labels are no more than the classes' numbers."""
    return all(text == str(c) for c, text in enumerate(texts))


def listed(classes: Sequence[int], texts: Sequence[str], most: int = 10) -> str:
    """The labels of some classes in a line; of more than `most` the first ones and how many follow."""
    named = ", ".join(texts[c] for c in classes[:most])
    return named if len(classes) <= most else f"{named} and {len(classes) - most} more"


def of_tasks(results: Mapping[str, Any], most: int = 26) -> list[str]:
    """For an axis of tasks: `1: wren, robin`, in at most `most` characters, and where classes are numbers the task's number.
    Nothing in them begins a formula."""
    texts, tasks = of_results(results), results["task_classes"]
    if are_numbers(texts):
        return [str(t) for t in range(1, len(tasks) + 1)]
    names = [f"{t}: {', '.join(texts[c] for c in ids)}" for t, ids in enumerate(tasks, start=1)]
    return [for_axis(name if len(name) <= most else f"{name[: most - 3].rstrip(', ')}...") for name in names]


def for_axis(text: str) -> str:
    """A text for a picture, where a dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 9]}...{name[-6:]}"
