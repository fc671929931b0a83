"""Trackers that have runs of their own: Weights & Biases and MLflow, as mirrors of a run folder (utils/run/mirror.py).

RUN/tracker.json remembers the tracker's run and how many rows it has. A resumed run goes on in the same one: rows that it has
are not sent again, rows that it lacks are read from metrics.jsonl. Where a stopped run repeats rows, the tracker keeps what it
was sent first, which differs in the times alone. The count is written before a row is sent: a kill (not a signal that the
program can answer) may cost the last rows there, and doubles none.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from utils.files.storage import write_json
from utils.run.mirror import About, scalars
from utils.text import shortened

STATE = "tracker.json"
PROJECT = "class-incremental"  # of Weights & Biases, unless WANDB_PROJECT names another
FLUSH = "x_transaction_log_flush_interval"  # how Weights & Biases calls it
AT_ONCE = 100  # parameters in a request of MLflow, which takes at most so many
LONGEST_VALUE, LONGEST_NAME, LONGEST_TAG = 490, 250, 58  # characters, a little below what the services take
PATIENCE = 120.0  # seconds for another process to make the tables of a new database


class Service(Protocol):
    """A tracker's run. `send`: the numbers of row `step`, written `seconds` after the run began."""

    def send(self, step: int, seconds: float, values: Mapping[str, float]) -> None: ...
    def finish(self, figures: Mapping[str, float]) -> None: ...
    def close(self, finished: bool) -> None: ...


class Remote:
    """The mirror over a service, which is sent every row once."""

    def __init__(self, service: Service, folder: Path, state: dict[str, Any], name: str, rows: int):
        self.service, self._file, self._state, self._mine = service, folder / STATE, state, state[name]
        self._finished = False
        if self._mine["rows"] < rows:
            lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
            for number, line in enumerate(lines):
                self.row(number, json.loads(line))

    def row(self, number: int, row: Mapping[str, Any]) -> None:
        """Sends row `number` (from 0) unless the service has it."""
        if number < self._mine["rows"]:
            return
        self._mine["rows"] = number + 1
        write_json(self._file, self._state)
        if values := dict(scalars(row)):
            self.service.send(number, float(row["time"]), values)

    def cut(self, count: int) -> None:
        """The rows after the first `count` will be written again; the service has them and gets none of them twice."""

    def finish(self, figures: Mapping[str, float]) -> None:
        self.service.finish(figures)
        self._finished = True

    def close(self) -> None:
        self.service.close(self._finished)


def attach(tracker: str, about: About, rows: int) -> Remote:
    """The mirror of `tracker`, "wandb" or "mlflow", in a folder whose metrics.jsonl has `rows` rows: over the run that an
    earlier process began there, else over a new one."""
    file = about.folder / STATE
    state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    before = state.get(tracker)
    service: WandB | MLflow = WandB(about, before) if tracker == "wandb" else MLflow(about, before)
    state[tracker] = before or {"id": service.id, "rows": 0}
    write_json(file, state)
    return Remote(service, about.folder, state, tracker, rows)


class WandB:
    """Online, offline (WANDB_MODE=offline) or off, as the package's variables say; its files are in RUN/wandb."""

    def __init__(self, about: About, before: Mapping[str, Any] | None):
        import wandb

        quiet: dict[str, Any] = {"console": "off", "silent": True}
        if FLUSH in getattr(wandb.Settings, "model_fields", {}):
            quiet[FLUSH] = 1.0  # seconds of rows that a kill costs in offline mode; the package's default is 15
        self.id = str(before["id"]) if before else uuid.uuid4().hex[:16]
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=about.experiment,
            name=about.name,
            id=self.id,
            resume="allow",
            dir=str(about.folder),
            config=dict(about.settings),
            allow_val_change=True,  # the device of a resumed run may be another
            tags=[shortened(f"{key}={value}", LONGEST_TAG) for key, value in about.tags.items()],
            settings=wandb.Settings(**quiet),
        )

    def send(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        self._run.log({**values, "seconds": seconds}, step=step)

    def finish(self, figures: Mapping[str, float]) -> None:
        self._run.summary.update({f"final/{key}": value for key, value in figures.items()})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """On the server of MLFLOW_TRACKING_URI, else in the file mlflow.db beside the folders of the experiments."""

    def __init__(self, about: About, before: Mapping[str, Any] | None):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._last = Metric, 0
        address = os.environ.get("MLFLOW_TRACKING_URI")
        database = about.folder.parents[2].absolute() / "mlflow.db"
        with _alone(None if address else database):
            self._client: Any = MlflowClient(tracking_uri=address or f"sqlite:///{database}")
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", about.experiment)
            experiment = self._client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        if before:
            self.id = str(before["id"])
            self._client.update_run(self.id, status="RUNNING")
            return
        self.id = str(self._client.create_run(number, tags=dict(about.tags), run_name=about.name).info.run_id)
        params = [
            Param(key, shortened(value if isinstance(value, str) else json.dumps(value), LONGEST_VALUE))
            for key, value in about.settings.items()
        ]
        for first in range(0, len(params), AT_ONCE):
            self._client.log_batch(self.id, params=params[first : first + AT_ONCE])

    def send(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        self._last = step
        self._log(step, {**values, "seconds": seconds})

    def finish(self, figures: Mapping[str, float]) -> None:
        self._log(self._last, {f"final/{key}": value for key, value in figures.items()})

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if finished else "KILLED")

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        now = round(time.time() * 1000)  # milliseconds, as MLflow counts
        metrics = [self._metric(_name(key), value, now, step) for key, value in values.items()]
        for first in range(0, len(metrics), AT_ONCE):
            self._client.log_batch(self.id, metrics=metrics[first : first + AT_ONCE])


def _name(tag: str) -> str:
    """A tag in the letters and the length that MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", tag)[:LONGEST_NAME]


@contextmanager
def _alone(database: Path | None) -> Iterator[None]:
    """Inside the block no other process opens the new database: each would make its tables."""
    if database is None:
        yield
        return
    from filelock import FileLock

    with FileLock(f"{database}.lock", timeout=PATIENCE):
        yield
