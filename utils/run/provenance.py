"""What the numbers of a run depend on: seed, settings, classes, data, weights, the method's sources, versions.

`provenance.json` in the run folder has it in full, `data/` the image files of the run; results.json and every saved state
carry its digests. The same command compares: with a finished run before its result is shown, with a stopped one before it
goes on. Other data, classes or weights are refused; other sources and versions are said, and recorded where a run goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.files import storage
from utils.process import machine, parallel
from utils.text import printable

if TYPE_CHECKING:
    import torch

    from utils.data.dataset import Dataset
    from utils.data.manifest import Changes, Contents, Manifest
    from utils.run.log import RunLog

FILE, FILES, CONTENTS = "provenance.json", "data/files", "data/contents"
PACKAGES = ("torch", "numpy", "timm", "torchvision", "pillow")
REMEDY = "put it back as it was, or start afresh with --resume never, which keeps the old folder"


@dataclass(frozen=True)
class Provenance:
    """`settings`: their hash; `classes`: names in the order of the data set; `images`: (training, test); `data`: digest of
    names and sizes of the files, or of the pixels in memory; `stamp`: the same with the files' times; `weights`: hash of the
    backbone's tensors; `weight_file`: (bytes, time in ns) of their file, if they come from one; `sources`: digest by file;
    `parent`: digest of the results that an extended run began with."""

    seed: int
    settings: str
    classes: tuple[str, ...]
    images: tuple[int, int]
    data: str
    stamp: str
    weights: str
    weight_file: tuple[int, int] | None
    sources: Mapping[str, str]
    versions: Mapping[str, str | None]
    parent: str = ""

    def identity(self) -> Identity:
        """What a saved state carries of it."""
        return Identity(self.weights, self.seed, self.settings, self.data, _digest(self.sources), (self.data,))


@dataclass(frozen=True)
class Recorded:
    """The provenance.json of a run: `now` as the newest process wrote it, `earlier`: data digests of before, which files that
    the run had not read yet made another; `changes`: sentences on what changed while the run was stopped."""

    now: Provenance
    earlier: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def versions(embedded: bool) -> dict[str, str | None]:
    """Versions of Python and of the packages that compute, and of those that hold or draw an embedded data set."""
    more = ("scikit-learn", "matplotlib") if embedded else ()
    return {"python": machine.python_version(), **machine.versions((*PACKAGES, *more))}


def read(folder: Path) -> Recorded | None:
    """What the run in `folder` recorded, None without a record (a run of an older version, or one that never began).

    Raises ValueError, in one line, if the record is damaged or changed."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_bytes())
        if values.pop("digest") != storage.digest_of(values):
            raise ValueError("its digest does not fit its content")
        more = {key: tuple(values.pop(key)) for key in ("earlier", "changes")}
        values |= {key: tuple(values[key]) for key in ("classes", "images")}
        values["weight_file"] = None if values["weight_file"] is None else tuple(values["weight_file"])
        return Recorded(Provenance(**values), **more)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None


def write(folder: Path, recorded: Recorded) -> None:
    """Writes provenance.json, unless it has this content already."""
    more = {"earlier": recorded.earlier, "changes": recorded.changes}
    values = storage.with_digest(storage.plain(dataclasses.asdict(recorded.now) | more))
    content = f"{json.dumps(values, indent=1)}\n".encode()  # ASCII: names that are not UTF-8 are escaped
    if not (folder / FILE).is_file() or (folder / FILE).read_bytes() != content:
        storage.write_bytes(folder / FILE, content)


# Saved states ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """Whose a saved state is. `accepted`: data digests that its run may have had."""

    weights: str
    seed: int | None = None
    settings: str = ""
    data: str = ""
    sources: str = ""
    accepted: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """What a saved state carries."""
        digests = {"seed": self.seed, "settings": self.settings, "data": self.data, "sources": self.sources}
        return {"weight_hash": self.weights, "provenance": digests}

    def refuse_others(self, facts: Mapping[str, Any], where: Path) -> None:
        """ValueError if the state with these `facts`, found at `where`, is of another run. A state of a version without
        provenance is compared by its weights, and by its seed where it has a record."""
        if facts["weight_hash"] != self.weights:
            raise ValueError(f"{where}: the backbone's weights changed since this run began; {REMEDY}")
        saved = dict(facts.get("provenance") or {"seed": (facts.get("record") or {}).get("seed")})
        for key, what in (("seed", "seed"), ("settings", "settings")):
            there, here = saved.get(key), getattr(self, key)
            if there and here and there != here:
                raise ValueError(
                    f"{where}: is the saved state of another run ({what} {there} there, {here} here): remove what does not "
                    "belong there, or start afresh with --resume never, which keeps the old folder"
                )
        if saved.get("data") and self.data and saved["data"] not in self.accepted:
            raise ValueError(
                f"{where}: the saved state was computed from other data (digest {saved['data']} there, {self.data} here): "
                f"{REMEDY}"
            )


# The same command again ------------------------------------------------------------------------------------------------


def data_differs(old: Provenance, manifest: Manifest, folder: Path) -> Changes:
    """What became of the data of the run in `folder` since `old` was recorded."""
    from utils.data import manifest as data_manifest

    if old.stamp == manifest.stamp:
        return data_manifest.Changes()
    if text := data_manifest.classes_differ(old.classes, manifest.classes):
        return data_manifest.Changes(text)
    before = data_manifest.read(folder / FILES)
    if before is not None and before.digest == old.data and manifest.names:
        return data_manifest.compare(before, manifest, data_manifest.read_contents(folder / CONTENTS))
    if old.data == manifest.digest:
        return data_manifest.Changes()  # other times, and nothing to compare the contents with
    train, test = manifest.train, len(manifest.labels) - manifest.train
    counts = f"{sum(old.images)} images then, {train + test} now" if old.images != (train, test) else "as many images"
    return data_manifest.Changes(f"other images or labels ({counts}; digest {old.data} then, {manifest.digest} now)")


def code_differs(old: Provenance, sources: Mapping[str, str], now: Mapping[str, str | None]) -> list[str]:
    """Sentences on sources and versions that are no longer those of `old`."""
    texts = []
    names = {*old.sources, *sources}
    if changed := sorted(name for name in names if old.sources.get(name) != sources.get(name)):
        shown = ", ".join(changed[:3]) + f" and {len(changed) - 3} more" * (len(changed) > 3)
        texts.append(f"source files of the method changed: {printable(shown)}")
    if others := {k: (old.versions.get(k), v) for k, v in now.items() if old.versions.get(k) != v}:
        texts.append(
            "versions changed: " + ", ".join(f"{k} {a or '-'} then, {b or '-'} now" for k, (a, b) in others.items())
        )
    return texts


@dataclass
class Origin:
    """The provenance of the run that this process computes, and the contents of the image files it reads."""

    folder: Path
    recorded: Recorded
    identity: Identity
    contents: Contents | None = None
    sources_changed: bool = field(default=False)

    def save(self) -> None:
        """Writes the digests of the images read so far; every rank must call it at the same point."""
        if self.contents is None:
            return
        by_rank = parallel.gather_objects(self.contents.news())
        for rank, (rows, digests) in enumerate(by_rank):
            if rank != parallel.rank():
                self.contents.learn(rows, digests)
        if parallel.is_first() and any(rows for rows, _ in by_rank):
            from utils.data import manifest as data_manifest

            data_manifest.write_contents(self.folder / CONTENTS, self.contents.known())

    def of_results(self) -> dict[str, Any]:
        """What results.json has of it. Every image file is read at least once for `content`."""
        now, content = self.recorded.now, self.recorded.now.data
        if self.contents is not None and parallel.is_first():
            content = self.contents.complete()
        return {
            "settings": now.settings,
            "data": now.data,
            "content": content,
            "classes": _digest(now.classes),
            "weights": now.weights,
            "sources": _digest(now.sources),
            "versions": dict(now.versions),
            "changes": list(self.recorded.changes),
            **({"parent": now.parent} if now.parent else {}),
        }


def begin(log: RunLog, now: Provenance, manifest: Manifest, dataset: Dataset) -> Origin:
    """Compares the run in the log's folder, if it has begun, with `now`, and records what it depends on from here.

    Raises ValueError, in one line with the remedy, if what it has computed comes from other data, classes or weights."""
    from utils.data import manifest as data_manifest

    def look() -> tuple[Any, dict[str, torch.Tensor]]:
        import torch

        digests = data_manifest.read_contents(log.folder / CONTENTS)
        verdict = _against_before(log.folder, now, manifest)
        known = {} if digests is None or not verdict[0] else {"known": torch.from_numpy(digests.copy())}
        return verdict, known

    (begun, faults, warnings, changes, earlier), tensors = parallel.broadcast_from_first(look)
    if faults:
        raise ValueError(f"{log.folder}: {'; '.join(faults)}; {REMEDY}")
    for text in (*warnings, *changes):
        log.warn(text)
    before, parent = _recorded_before(log.folder) if begun else ((), "")
    now = dataclasses.replace(now, parent=now.parent or parent)
    recorded = Recorded(now, tuple(earlier), (*before, *changes))
    known = tensors["known"].numpy() if "known" in tensors else None
    contents = data_manifest.Contents(manifest, known) if manifest.names else None
    if contents is not None:
        contents.watch(dataset)
    if parallel.is_first():
        write(log.folder, recorded)
        if contents is not None:
            data_manifest.write(log.folder / FILES, manifest)
            if known is None:
                data_manifest.write_contents(log.folder / CONTENTS, contents.known())
    identity = dataclasses.replace(now.identity(), accepted=(now.data, *recorded.earlier))
    return Origin(log.folder, recorded, identity, contents, any("source files" in text for text in changes))


def _recorded_before(folder: Path) -> tuple[tuple[str, ...], str]:
    """(the changes, the parent) in the record of the run."""
    try:
        recorded = read(folder)
    except ValueError:
        return (), ""
    return ((), "") if recorded is None else (recorded.changes, recorded.now.parent)


def _against_before(
    folder: Path, now: Provenance, manifest: Manifest
) -> tuple[bool, list[str], list[str], list[str], list[str]]:
    """(whether the run has saved states, faults, warnings, changes to record, data digests of before)."""
    if not any(folder.glob("checkpoints/task_*")):
        return False, [], [], [], []
    try:
        recorded = read(folder)
    except ValueError as error:
        return True, [], [f"{error}: what the run began with is compared by its saved states alone"], [], []
    if recorded is None:
        return (
            True,
            [],
            ["the version of the program that began this run recorded no provenance: nothing is compared"],
            [],
            [],
        )
    old, faults, warnings, earlier = recorded.now, [], [], list(recorded.earlier)
    if (old.seed, old.settings) != (now.seed, now.settings):
        faults.append(f"{FILE} is of another run (seed {old.seed}, settings {old.settings})")
    changes = data_differs(old, manifest, folder)
    if changes.fatal:
        faults.append(f"the data changed since this run began: {changes.fatal}")
    elif changes.unread and old.data != manifest.digest:
        earlier.append(old.data)
    if changes.unread:
        warnings.append(
            f"{_count(changes.unread)} written again before this run read {'it' if len(changes.unread) == 1 else 'them'}"
        )
    if old.weights != now.weights:
        faults.append(f"the backbone's weights changed since this run began ({old.weights} then, {now.weights} now)")
    texts = [f"{text}; the run goes on with them" for text in code_differs(old, now.sources, now.versions)]
    return True, faults, warnings, texts, earlier


def _count(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:3])
    return f"{len(names)} image{'s' * (len(names) != 1)} ({shown}{', ...' * (len(names) > 3)})"


# Several seeds in one row ----------------------------------------------------------------------------------------------

MIXED = {"data": "data sets", "content": "images", "weights": "backbone weights"}
SAID = {"sources": "source files", "versions": "versions"}


def mixed(by_seed: Mapping[int, Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """(what forbids a mean over these seeds, what should be said beside it), from the results of each seed. Runs without
    provenance are left out."""
    known = {seed: results["provenance"] for seed, results in by_seed.items() if results.get("provenance")}
    faults: list[str] = []
    remarks: list[str] = []
    for keys, texts in ((MIXED, faults), (SAID, remarks)):
        for key, what in keys.items():
            groups: dict[str, list[int]] = {}
            for seed, provenance in known.items():
                groups.setdefault(json.dumps(provenance.get(key), sort_keys=True), []).append(seed)
            if len(groups) > 1:
                text = " and ".join(
                    f"seed{'s' * (len(g) > 1)} {', '.join(map(str, g[:8]))}" for g in list(groups.values())[:3]
                )
                texts.append(f"{text} ran with different {what}")
                break
    return faults, remarks
