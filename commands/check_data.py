"""What `--check` finds in the data of an experiment: classes, numbers of images, files that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from utils import data
from utils.data.names import readable
from utils.run import progress
from utils.text import WIDTH, counted

if TYPE_CHECKING:
    from utils.config.schema import Experiment

SHOWN = 12  # class names in the table


@dataclass(frozen=True)
class DataFound:
    """`names` of the classes and `images`: training images of each, where the data are here; `table`: lines to print; `notes`,
    `faults` and what is `missing` on this machine, one line each."""

    names: tuple[str, ...] = ()
    images: tuple[int, ...] = ()
    table: str = ""
    notes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def look(cfg: Experiment, full: bool = False) -> DataFound:
    """Reads the class folders of a set of files and the header of every image, with `full` every pixel; CIFAR's files as a run
    does. Of embedded sets there is nothing to find but names, unless keys leave out training images."""
    places, kind = data.places(cfg), data.DATASETS[cfg.dataset].kind
    if kind == "embedded" and cfg.shots is None and cfg.imbalance is None:
        return DataFound(names=data.shipped_names(cfg.dataset))
    lacking = data.missing(cfg.dataset, **places)
    if lacking and cfg.dataset != "folder" and data.is_absent(cfg.dataset, **places):
        return DataFound(missing=(lacking,))
    if lacking:
        return DataFound(faults=(lacking,))
    try:
        with progress.of_images() as bar:
            how: dict[str, Any] = {"look_at_all": True, "full": full, "progress": bar}
            dataset = data.load(cfg.dataset, **places, **data.reading(cfg), **how)
    except data.DataFaults as error:
        return DataFound(faults=error.lines(), notes=(error.remedy,) if error.remedy else ())
    except (OSError, ValueError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
        return DataFound(faults=(text,))
    names = tuple(dataset.class_names)
    parts = {"training": dataset.train.labels.tolist(), "test": dataset.test.labels.tolist()}
    counts = {part: [labels.count(k) for k in range(len(names))] for part, labels in parts.items()}
    seen = "" if kind != "folders" else ", every image decoded" if full else ", the header of every image read"
    where = places["path"] if cfg.dataset == "folder" else places["root"]
    place = "this program" if kind == "embedded" else readable(str(where))
    head = f"data ({counted(len(names), 'class', 'classes')} in {place}{seen})"
    text = table(head, names, counts)
    if dataset.as_published:
        whose = "LAMDA-PILOT's" if kind == "folders" else "its authors'"
        text += f"\n  split           the published one by its numbers of images ({whose})"
    return DataFound(names, tuple(counts["training"]), text, dataset.notes)


def table(head: str, names: Sequence[str], counts: dict[str, list[int]]) -> str:
    """Images of each part, their smallest, median and largest number of a class, and the first class names."""
    lines = [head]
    for part, of_class in counts.items():
        low, high = min(of_class), max(of_class)
        which = f" ({names[of_class.index(low)]})" if low != high else ""
        spread = f"a class {low:,}{which} to {high:,}, median {median(of_class):,.0f}"
        lines.append(f"  {part + ' images':<16}{sum(of_class):>9,}   {spread}")
    more = f", ... ({len(names) - SHOWN} more)" if len(names) > SHOWN else ""
    text = f"  classes         {', '.join(name[:40] for name in names[:SHOWN])}{more}"
    return "\n".join([*lines, text if len(text) <= 4 * WIDTH else f"{text[: 4 * WIDTH]} ..."])
