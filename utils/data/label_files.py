"""Which image has which label and belongs to which part, from the file or folder of the key data_split.

Three forms: a CSV or TSV file with the columns path, label and, if it has the parts, split; a text file with a line
`path label` for each image; a folder with train and test (or val) files of either form. Paths are relative to data_path.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from utils.data.dataset import DataFaults
from utils.data.layout import part_of
from utils.data.listing import Found, fault_of_file
from utils.data.names import listed, readable, same_but_for_form
from utils.text import counted, nearest, shown

TABLES, LISTS = (".csv", ".tsv"), (".txt", ".lst", ".list")
# What the columns of a table may be called, in lower case; the first name is the one we write.
COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "filepath", "image", "image_path", "img"),
    "label": ("label", "class", "class_name", "category", "target"),
    "split": ("split", "part", "subset", "set", "partition"),
}


@dataclass(frozen=True)
class Row:
    """One image: where it stands in the file, its path as written, its label, and train, test, val or None."""

    where: str
    path: str
    label: str
    part: str | None


def class_names(source: Path, folder: Path) -> list[str]:
    """The labels, as numbers in their order if all are whole numbers, else as text. Raises as `read`, images apart."""
    if not folder.is_dir():
        raise FileNotFoundError(f"data_path: no folder {readable(os.path.abspath(folder))}")
    parts, _ = _parts(source)
    return _ordered(row.label for row in parts["train"])


def read(source: Path, folder: Path) -> Found:
    """The image files by label. Raises FileNotFoundError without the file, DataFaults with every fault by its line: images
    that are missing, empty or stand there twice, labels without training images."""
    names = class_names(source, folder)
    parts, notes = _parts(source)
    faults: list[str] = []
    broken: dict[str, str] = {}
    first: dict[str, Row] = {}
    files_of: dict[str, dict[str, list[str]]] = {part: {name: [] for name in names} for part in parts}
    for part, rows in parts.items():
        for row in rows:
            file = os.path.join(folder, row.path)
            if (other := first.setdefault(os.path.normpath(file), row)) is not row:
                faults.append(f"{row.where}: {shown(row.path)} stands in {other.where} already; keep one")
            elif not os.path.lexists(file):
                faults.append(f"{row.where}: no image {readable(file)}")
            else:
                files_of[part][row.label].append(file)
                if fault := fault_of_file(file):
                    broken[file] = fault
    for part, by_label in files_of.items():
        absent = [name for name, files in by_label.items() if not files]
        if absent and not faults:
            faults.append(
                f"{source}: no {part} images for {counted(len(absent), 'class', 'classes')}: {listed(absent)}"
            )
    if "test" not in files_of and not faults:
        faults += [f"{source}: class {name} has one image; at least two are needed for train and test"
                   for name, files in files_of["train"].items() if len(files) == 1]  # fmt: skip
    DataFaults.refuse(f"folder, from {source}", faults)
    return Found(files_of["train"], files_of.get("test"), notes, broken)


def _parts(source: Path) -> tuple[dict[str, list[Row]], tuple[str, ...]]:
    """({"train": rows, and "test": rows if there is a test set}, notes)."""
    parts: dict[str, list[Row]] = {}
    notes: list[str] = []
    if source.is_dir():
        for name in sorted(os.listdir(source)):
            stem, ending = os.path.splitext(name)
            if ending.lower() in (*TABLES, *LISTS) and (part := part_of(stem)):
                if part in parts:
                    raise ValueError(f"data_split: {source} has two files for {part}; remove one")
                parts[part] = [Row(row.where, row.path, row.label, part) for row in _rows(source / name)]
        if "train" not in parts:
            raise ValueError(f"data_split: {source} has no train{' or train'.join((*TABLES, *LISTS[:1]))}")
    else:
        rows = _rows(source)
        if all(row.part is None for row in rows):
            beside = [name for name in os.listdir(source.parent) if part_of(Path(name).stem) in ("test", "val")]
            if part_of(source.stem) == "train" and beside:
                raise ValueError(
                    f"data_split: {source} has the training images alone, and {beside[0]} lies beside it; set data_split to "
                    f"the folder {source.parent}"
                )
            return {"train": _without_faults(source, rows)}, ()
        for row in rows:
            parts.setdefault(row.part or "", []).append(row)
    faults = [f"{row.where}: train, test or val is expected in the column split" for row in parts.pop("", [])]
    DataFaults.refuse(f"folder, from {source}", faults)
    if "train" not in parts:
        raise ValueError(f"data_split: {source} has no training images")
    if "val" in parts and "test" in parts:
        notes.append(f"the part val is not used ({counted(len(parts.pop('val')), 'image')}), test is the test set")
    elif "val" in parts:
        parts["test"] = parts.pop("val")
        notes.append("the part val is the test set, since there is no part test")
    for part, rows in parts.items():
        _without_faults(source, rows)
        if part == "test" and (extra := sorted({r.label for r in rows} - {r.label for r in parts["train"]})):
            raise ValueError(
                f"data_split: {source} has no training image for {counted(len(extra), 'class', 'classes')} of its test images: "
                f"{listed(extra)}{same_but_for_form(extra, [r.label for r in parts['train']])}"
            )
    return parts, tuple(notes)


def _without_faults(source: Path, rows: list[Row]) -> list[Row]:
    faults = [f"{row.where}: {row.label}" for row in rows if not row.path]
    DataFaults.refuse(f"folder, from {source}", faults)
    if not rows:
        raise ValueError(f"data_split: {source} names no image")
    return rows


def _rows(path: Path) -> list[Row]:
    """The rows of a file; one with a fault has no path, and the fault as its label."""
    try:
        facts = os.stat(path)
    except OSError as error:
        near = nearest(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
        raise FileNotFoundError(f"data_split: {readable(str(path))}: {error.strerror}{near}") from None
    if path.suffix.lower() not in (*TABLES, *LISTS):
        raise ValueError(
            f"data_split: {path} should end in {' '.join((*TABLES, *LISTS))}, or be a folder of such files"
        )
    return list(_read(path, facts.st_size, facts.st_mtime_ns))


@lru_cache(maxsize=8)  # a check asks several times; a file that changed has another size or time
def _read(path: Path, size: int, time: int) -> tuple[Row, ...]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data_split: {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    if path.suffix.lower() in TABLES:
        return tuple(_of_table(path, text))
    return tuple(_of_list(path, text))


def _of_list(path: Path, text: str) -> Iterable[Row]:
    for number, line in enumerate(text.splitlines(), start=1):
        line, where = line.strip(), f"{path.name} line {number}"
        if not line or line.startswith("#"):
            continue
        file, _, label = line.rpartition("\t" if "\t" in line else " " if " " in line else ",")
        fault = "" if file.strip() else f"`path label` is expected, got {shown(line)}"
        yield Row(where, "" if fault else file.strip(), fault or label.strip(), None)


def _of_table(path: Path, text: str) -> Iterable[Row]:
    separator = "\t" if path.suffix.lower() == ".tsv" else ";" if ";" in text.partition("\n")[0] else ","
    lines = csv.reader(text.splitlines(), delimiter=separator)
    head = [word.strip().lower() for word in next(lines, [])]
    place = {column: [k for k, word in enumerate(head) if word in words] for column, words in COLUMNS.items()}
    for column in ("path", "label"):
        if len(place[column]) != 1:
            raise ValueError(
                f"data_split: {path} line 1 should name the columns path, label and perhaps split; "
                f"{'no' if not place[column] else 'two'} column for {column} in {shown(', '.join(head))} (known: "
                f"{', '.join(COLUMNS[column])})"
            )
    for cells in lines:
        where = f"{path.name} line {lines.line_num}"
        if not any(cell.strip() for cell in cells):
            continue
        cell = {column: cells[at[0]].strip() if at and at[0] < len(cells) else "" for column, at in place.items()}
        part = part_of(cell["split"]) if place["split"] else None
        fault = ""
        if len(cells) != len(head):
            fault = f"{len(cells)} cells where line 1 has {len(head)}"
        elif not cell["path"] or not cell["label"]:
            fault = f"no {'path' if not cell['path'] else 'label'}"
        elif place["split"] and part is None:
            fault = f"split {shown(cell['split'])} is not known; train, test or val is expected"
        yield Row(
            where, "" if fault else cell["path"], fault or cell["label"], part or ("train" if place["split"] else None)
        )


def _ordered(labels: Iterable[str]) -> list[str]:
    names: Sequence[str] = sorted(set(labels))
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else list(names)
