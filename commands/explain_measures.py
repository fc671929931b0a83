"""The part of `--explain` on classes, images, calibration and cost: sentences from results.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from utils.report import class_names
from utils.text import counted, number


def sentences(results: Mapping[str, Any]) -> Iterator[str]:
    """Of the finished model; none where a run of an older version did not count."""
    if ends := results.get("last_accuracy_interval"):
        yield f"From its test images alone the last accuracy is known to {number(ends[0])} to {number(ends[1])} (95 %)."
    if (learning := results.get("learning_accuracy")) is not None:
        yield f"Right after they came, tasks stood at {number(learning)} in the mean."
    names = class_names.of_results(results)
    yield from _classes(results, names)
    yield from _pairs(results, names)
    calibration = results.get("calibration")
    if calibration and calibration["ece"] is not None:
        yield f"Its confidence is off by {number(calibration['ece'])} points in the mean (ECE)."
    operations = [count for count in results.get("operations") or [] if count]
    if operations:
        more = f", {number(operations[-1] / operations[0])} times as many as after the first task"
        more *= operations[-1] != operations[0]
        yield f"A prediction takes {operations[-1] / 1e9:,.3f} GFLOP{more}."
    if (hours := results.get("cpu_hours")) is not None:
        on_gpu = results["gpu_hours"]
        yield f"The run took {number(hours, 3)} CPU hours" + (f" and {number(on_gpu, 3)} GPU hours." if on_gpu else ".")


def _classes(results: Mapping[str, Any], names: list[str]) -> Iterator[str]:
    known = [(a, c) for c, a in enumerate(results.get("class_accuracy") or []) if a is not None]
    if len(known) > 1:
        (low, worst), (high, best) = min(known), max(known, key=lambda pair: (pair[0], -pair[1]))
        yield f"The worst class is {names[worst]} with {number(low)}, the best {names[best]} with {number(high)}."


def _pairs(results: Mapping[str, Any], names: list[str]) -> Iterator[str]:
    if pairs := results.get("class_confusion"):
        true, predicted, count = pairs[0]
        taken = "no class" if predicted is None else names[predicted]
        yield f"Most often {names[true]} is taken for {taken}: {counted(count, 'image')} of {results['class_images'][true]}."
