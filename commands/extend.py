"""`--extend RUN --set data_path=FOLDER`: new classes after a finished run, in a new run that begins where that one ended.

The new run's settings are those of RUN with more folders of classes, more tasks and the class order in full, so the same run
can be had in one go from its config.json. Its folder begins with the state, the record and the rows of RUN, and goes on as a
stopped run does. RUN is never changed; the new run's provenance.json and results.json name the digest of its results.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import models
from commands import load as needs
from commands import present, saved
from utils import data
from utils.config import strict_json
from utils.config.hashing import NOT_HASHED
from utils.config.resolve import Resolved
from utils.process import parallel
from utils.report.results import read
from utils.run import checkpoint, folder, provenance
from utils.run.record import RunRecord
from utils.text import counted, nearest

if TYPE_CHECKING:
    from torch import Tensor

CHANGES = ("data_path", "increment")  # and keys that change no number
SUFFIX = "_extended"
DECAY = (
    "the head's rows of the new classes have their start values; in a run of all classes from the start, weight decay would "
    "have shrunk them in every task before (the numbers are the same with weight_decay 0, and with decay_other_rows false "
    "where the method has that key)"
)


def experiment(args: argparse.Namespace) -> Resolved:
    """The settings of the new run; `args.config` then names the folder of its runs. Raises ValueError if the run is not
    finished or cannot go on, ConfigError for keys that would change what it has learned."""
    if parallel.torchrun_ranks()[1] > 1:
        raise ValueError("--extend begins in one process: start it without torchrun")
    args.extend = saved.seed_folder(args.extend)
    before = read(args.extend, "results.json")
    values, faults = strict_json.read_json(args.extend / "config.json")
    overrides, more = strict_json.parse_set(args.set)
    overrides |= {"device": args.device} if args.device is not None else {}
    for key in overrides.keys() - {*CHANGES, *NOT_HASHED} | overrides.keys() & {"seed", "expected"}:
        known = ", ".join(CHANGES)
        more.append(
            f"{key}: RUN has learned with another value; --extend takes {known}, and keys that change no number"
        )
    if values.get("dataset") != "folder":
        more.append(
            f"dataset: the classes of {values.get('dataset')} are all learned; --extend goes on with class folders"
        )
    if values.get("imbalance") is not None:
        more.append(
            "imbalance: how many images each class has depends on the number of all classes; RUN cannot be extended"
        )
    if (path := overrides.pop("data_path", None)) is None:
        more.append("data_path: must name the folder of the new classes: --set data_path=FOLDER")
    source = f"--extend {args.extend}"
    if faults or more:
        raise strict_json.ConfigError(source, [*faults, *more])
    new = [path] if isinstance(path, str) else list(path)
    old = values["data_path"] if isinstance(values["data_path"], list) else [values["data_path"]]
    values |= _tasks(before, values, new, overrides.pop("increment", None))
    values |= {"data_path": [*old, *new], "expected": None} | overrides
    args.config = Path(f"{args.extend.resolve().parent.parent.name.removesuffix(SUFFIX)}{SUFFIX}.json")
    resolved = saved.resolved(values, source)
    learner: Any = models.learner_of(resolved.settings.model_name)
    if reason := learner.cannot_go_on(resolved.settings):
        raise ValueError(f"{args.extend} cannot be extended: {reason}")
    return resolved


def _tasks(before: dict[str, Any], values: dict[str, Any], new: list[str], increment: Any) -> dict[str, Any]:
    """Class order and task sizes: those of the finished run, then the new classes in an order drawn from its seed."""
    from utils.data.tasks import drawn_order, task_sizes

    order, sizes = before["class_order"], [len(classes) for classes in before["task_classes"]]
    places = [Path(one).expanduser() for one in new]
    for text, place in zip(new, places, strict=True):
        if fault := data.missing("folder", path=place):
            near = [str(other) for other in place.parent.glob("*")] if place.parent.is_dir() else []
            raise FileNotFoundError(f"{fault}{nearest(text, near)}")
    count = sum(data.count_classes("folder", path=place) or 0 for place in places)
    step = sizes[-1] if increment is None else increment
    first: Any
    rest: Any
    first, rest = (step[0], step[1:]) if isinstance(step, list) and step else (step, step)
    try:
        later = task_sizes(count, min(first, count) if increment is None else first, rest)
    except TypeError:
        raise ValueError(f"increment: a whole number or a list of them is expected, got {increment!r}") from None
    seed = values["seed"][0] if values.get("class_order_seed") is None else values["class_order_seed"]
    drawn = drawn_order(count, seed, values.get("shuffle", True))
    return {
        "init_cls": sizes[0],
        "increment": [*sizes[1:], *later],
        "class_order": [*order, *(len(order) + k for k in drawn)],
        "class_order_seed": None,
        "shuffle": True,
    }


def prepare(resolved: Resolved, args: argparse.Namespace) -> None:
    """Gives the new run its folder with the state at the end of the finished one, unless it has begun. With --resume never an
    earlier folder is moved aside.

    Raises ValueError where the finished run's data, classes or weights changed, or the new run began from other results."""
    cfg, before = resolved.settings, read(args.extend, "results.json")
    (seed,) = cfg.seed
    place = args.out / args.config.stem / resolved.hash / f"seed_{seed}"
    present_now = present.Present()
    values = strict_json.read_json(args.extend / "config.json")[0]
    present_now.compare(saved.resolved(values, str(args.extend / "config.json")), args.extend, str(args.extend))
    present_now.tell()
    if args.resume == "never":
        folder.move_aside(place)
        args.resume = "auto"
    if any(place.glob("checkpoints/task_*.json")) or (place / "results.json").is_file():
        recorded = provenance.read(place)
        if recorded is None or recorded.now.parent != before["digest"]:
            raise ValueError(
                f"{place} began from other results than those of {args.extend}; --resume never begins it anew and keeps the "
                "old folder"
            )
        return
    dataset, (backbone, facts) = needs.dataset(resolved), needs.backbone(cfg)
    state, _ = checkpoint.newest(args.extend / "checkpoints", learned=False)
    if state is None or state.task != len(before["task_classes"]) - 1:
        raise ValueError(f"{args.extend}: the checkpoint of its last task is gone, so nothing can go on from it")
    learner = models.build(cfg, backbone, len(cfg.class_order or ()), seed, None)
    learner.restore(state.facts["structure"])
    counts = len(before["class_order"]), learner.num_classes
    tensors = widened(learner.own_state(), state.tensors, *counts, cfg.model_name)
    place.mkdir(parents=True, exist_ok=True)
    lines = (args.extend / "metrics.jsonl").read_bytes().splitlines(keepends=True)[: state.facts["rows"]]
    (place / "metrics.jsonl").write_bytes(b"".join(lines))
    if (args.extend / "samples").is_dir():
        shutil.copytree(args.extend / "samples", place / "samples", dirs_exist_ok=True)
    with folder.open_log(place, args.out / "latest", False, (), set()) as log:
        now, manifest = present.of(resolved, seed, dataset, facts)
        origin = provenance.begin(log, dataclasses.replace(now, parent=before["digest"]), manifest, dataset)
        record = _record(state.facts["record"], cfg)
        rest = {"structure": state.facts["structure"], "record": record, "rows": log.rows, "measured": None}
        checkpoint.write(
            place / "checkpoints", checkpoint.Checkpoint(state.task, rest | origin.identity.facts(), tensors)
        )
        if "head.weight" in tensors and getattr(cfg, "weight_decay", 0) > 0 and getattr(cfg, "decay_other_rows", True):
            log.warn(DECAY)
        new = counted(counts[1] - counts[0], "new class", "new classes")
        log.info(f"begins with the {counts[0]} classes of {args.extend} (digest {before['digest']}), then {new}")


def _record(old: dict[str, Any], cfg: Any) -> dict[str, Any]:
    """The finished run's record with the classes and tasks of the new one."""
    record, order, end = RunRecord.from_dict(old), list(cfg.class_order), 0
    record.class_order, record.task_classes = order, []
    for size in (cfg.init_cls, *cfg.increment):
        record.task_classes.append(order[end : end + size])
        end += size
    return record.to_dict()


def widened(fresh: dict[str, Tensor], old: dict[str, Tensor], before: int, now: int, method: str) -> dict[str, Tensor]:
    """The state of a learner of `now` classes: the `old` one of `before` classes, and for the new classes the `fresh` values.

    Raises ValueError if a tensor differs in more than its number of classes."""
    wrong = sorted(fresh.keys() ^ old.keys())
    state = {}
    for name in sorted(fresh.keys() & old.keys()):
        ours, theirs = fresh[name], old[name]
        apart = [dim for dim, (a, b) in enumerate(zip(ours.shape, theirs.shape, strict=False)) if a != b]
        if not apart and ours.dim() == theirs.dim():
            state[name] = theirs
        elif (
            ours.dim() == theirs.dim()
            and len(apart) == 1
            and (theirs.shape[apart[0]], ours.shape[apart[0]]) == (before, now)
        ):
            state[name] = ours.detach().cpu().clone()
            state[name].narrow(apart[0], 0, before).copy_(theirs)
        else:
            wrong.append(name)
    if wrong:
        raise ValueError(
            f"{method} cannot be extended: its state does not grow by classes alone: {', '.join(sorted(wrong)[:5])}"
        )
    return {name: state[name] for name in fresh}
