"""What a run would depend on now, and whether finished runs still come from it (utils/run/provenance.py).

Each data set and weights file is looked at once, however many finished runs a sweep has. For a run on an embedded set, which
is drawn by this program, only weights, sources and versions are compared, so that its result is shown in a moment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbone.catalogue import EMBEDDED
from commands import load, report
from utils import data
from utils.config.resolve import Resolved
from utils.config.schema import Experiment
from utils.process import machine as this_machine
from utils.process import parallel, sources
from utils.run import provenance
from utils.text import one_line, shortened

if TYPE_CHECKING:
    from backbone.weights import BackboneFacts
    from utils.data.dataset import Dataset
    from utils.data.manifest import Manifest

# Where every run's numbers come from, beside the method's file: images, tasks, scores, weights.
SHARED = ("utils/data/tasks.py", "utils/evaluation/scores.py", "utils/evaluation/metrics.py", "backbone/weights.py")


def source_digests(cfg: Experiment) -> dict[str, str]:
    """Digests of the source files that the numbers of a run with these settings depend on, as this process found them."""
    embedded = data.DATASETS[cfg.dataset].kind == "embedded"
    places = (f"{place}/{cfg.dataset}*" for place in ("utils/data", "utils/data/shipped"))  # the module, and its images
    files = [path for place in places for path in sources.ROOT.glob(place) if path.is_file()] if embedded else []
    drawn = sorted(path.relative_to(sources.ROOT).as_posix() for path in files)
    return sources.at_start((f"models/{cfg.model_name}.py", *SHARED, *drawn))


def versions(cfg: Experiment) -> dict[str, str | None]:
    return provenance.versions(data.DATASETS[cfg.dataset].kind == "embedded")


def weight_file(cfg: Experiment) -> Path | None:
    """The file that holds the weights: of the hub's the one in its cache. None for random ones, and where there is no file."""
    if cfg.backbone_weights == "random":
        return None
    if cfg.backbone_weights == "pretrained":
        if cfg.backbone_type == EMBEDDED:
            return sources.ROOT / "backbone" / "embedded.safetensors"
        from backbone import weights

        return weights.cached(cfg)
    return Path(os.path.expanduser(cfg.backbone_weights))


def _file_facts(path: Path | None) -> tuple[int, int] | None:
    try:
        facts = path.stat() if path else None
    except OSError:
        return None
    return (facts.st_size, facts.st_mtime_ns) if facts else None


def of(
    experiment: Resolved, seed: int, dataset: Dataset, facts: BackboneFacts
) -> tuple[provenance.Provenance, Manifest]:
    """What a run of `seed` depends on now, with the manifest of its data."""
    from utils.data import manifest as data_manifest

    cfg, manifest = experiment.settings, data_manifest.of(dataset)
    now = provenance.Provenance(
        seed,
        experiment.hash,
        manifest.classes,
        (manifest.train, len(manifest.labels) - manifest.train),
        manifest.digest,
        manifest.stamp,
        facts.weight_hash,
        _file_facts(weight_file(cfg)),
        source_digests(cfg),
        versions(cfg),
    )
    return now, manifest


@dataclass
class Present:
    """Compares finished runs with what is there now. `faults`: what forbids to show their results, with the runs it concerns;
    `remarks`: what should be said beside them."""

    faults: dict[str, list[str]] = field(default_factory=dict)
    remarks: dict[str, list[str]] = field(default_factory=dict)
    _manifests: dict[str, Manifest | str] = field(default_factory=dict)
    _weights: dict[str, str] = field(default_factory=dict)

    def compare(self, experiment: Resolved, folder: Path, name: str) -> None:
        """Adds what differs between the finished run in `folder`, called `name`, and the present."""
        try:
            recorded = provenance.read(folder)
        except ValueError as error:
            return self._add(self.faults, str(error), name)
        if recorded is None:
            text = "recorded no provenance (an older version of the program ran it): nothing is compared"
            return self._add(self.remarks, text, name)
        old, cfg = recorded.now, experiment.settings
        if old.settings != experiment.hash:
            self._add(self.faults, f"{folder / provenance.FILE} is of other settings", name)
        for text in self._data(experiment, old, folder):
            self._add(self.faults if text.startswith("the data changed") else self.remarks, text, name)
        if (hash_now := self._weight_hash(cfg, old)) != old.weights:
            text = f"the backbone's weights changed since ({old.weights} then, {hash_now} now)"
            self._add(self.faults, text, name)
        for text in provenance.code_differs(old, source_digests(cfg), versions(cfg)):
            self._add(self.remarks, text, name)
        return None

    def tell(self) -> None:
        """Prints the remarks. Raises ValueError, in one line, with the faults."""
        for text, names in self.remarks.items():
            print(one_line(f"warning: {_listed(names)}: {text}"), file=sys.stderr)
        if self.faults:
            texts = [
                f"{_listed(names)} {'are' if len(names) > 1 else 'is'} finished, but {text}"
                for text, names in self.faults.items()
            ]
            more = f" (and {len(texts) - 2} more)" * (len(texts) > 2)
            raise ValueError(
                f"{'; '.join(texts[:2])}{more}: the old result is not shown. Put it back as it was, or --resume never runs it "
                "anew and keeps the old folder"
            )

    @staticmethod
    def _add(texts: dict[str, list[str]], text: str, name: str) -> None:
        texts.setdefault(text, []).append(name)

    def _data(self, experiment: Resolved, old: provenance.Provenance, folder: Path) -> list[str]:
        if data.DATASETS[experiment.settings.dataset].kind == "embedded":
            return []
        manifest = self._manifest(experiment)
        if isinstance(manifest, str):
            return [manifest]
        changes = provenance.data_differs(old, manifest, folder)
        text = changes.fatal or (f"{len(changes.unread)} images changed" if changes.unread else "")
        return [f"the data changed since: {text}"] if text else []

    def _manifest(self, experiment: Resolved) -> Manifest | str:
        """The manifest of the data, or in words why there is none."""
        cfg = experiment.settings
        key = f"{cfg.dataset} {data.places(cfg)} {data.reading(cfg)}"
        if key not in self._manifests:
            from utils.data import manifest as data_manifest

            try:
                self._manifests[key] = data_manifest.of(load.read_data(experiment))
            except FileNotFoundError as error:
                self._manifests[key] = f"its data are not on this machine and are not compared ({_line(error)})"
            except (ValueError, OSError) as error:
                self._manifests[key] = f"the data changed since: {_line(error)}"
        return self._manifests[key]

    def _weight_hash(self, cfg: Experiment, old: provenance.Provenance) -> str:
        """The hash of the weights now; of a file as large and as old as then it is not computed again."""
        path = weight_file(cfg)
        if path is None or (now := _file_facts(path)) is None or now == old.weight_file:
            return old.weights
        if (key := f"{path} {cfg.backbone_type} {cfg.backbone_depth} {cfg.image_size}") not in self._weights:
            from backbone import weights

            self._weights[key] = weights.build(cfg)[1].weight_hash
        return self._weights[key]


def finished_results(
    experiment: Resolved, folders: Mapping[int, Path], afresh: bool
) -> dict[int, dict[str, Any] | None]:
    """The results of the seeds that are finished, None for the others; with `afresh` for all. Rank 0 alone reads files.

    Raises ValueError where the data, classes or weights are no longer those of a finished seed."""
    from utils.report.results import result_of

    device = experiment.settings.device
    if parallel.torchrun_ranks()[1] > 1:
        this_machine.check_torchvision()
        parallel.start(device)
    if afresh:
        return dict.fromkeys(folders)

    def look() -> tuple[Any, dict[str, Any]]:
        results = [result_of(folder) for folder in folders.values()]
        finished = [(seed, folder) for (seed, folder), r in zip(folders.items(), results, strict=True) if r is not None]
        present = Present()
        for seed, folder in finished:
            present.compare(experiment, folder, f"seed {seed}")
        present.tell()
        for _, folder in finished:
            report.restore(folder)
        return results, {}

    results, _ = parallel.broadcast_from_first(look)
    return dict(zip(folders, results, strict=True))


def refuse_mixed(by_seed: Mapping[int, Mapping[str, Any]], row: str = "") -> None:
    """Raises ValueError if the results of these seeds come from different data or weights; warns of sources and versions."""
    faults, remarks = provenance.mixed(by_seed)
    label = f"{row}: " if row else ""
    for text in remarks:
        print(one_line(f"warning: {label}{text}"), file=sys.stderr)
    if faults:
        raise ValueError(f"{label}{faults[0]}: no mean is taken over them; --resume never runs them all anew")


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)
    return shown


def _line(error: Exception) -> str:
    return shortened(" ".join(str(error).split()), 400)
