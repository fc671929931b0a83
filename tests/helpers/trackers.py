"""Stand-ins for the packages wandb and mlflow, which tests do not need: they take the real calls and remember them.

`calls` are (name, arguments) as the program makes them; `tests/utils/run/test_services.py` binds them to the signatures of the
real packages where those are installed.
"""

import importlib.machinery
import sys
from types import ModuleType, SimpleNamespace
from typing import Any


def _module(monkeypatch, name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)
    return module


class Wandb:
    """`rows`: {run id: [(step, values)]}; `broken`: the call that raises."""

    def __init__(self, monkeypatch, broken: str = ""):
        self.calls, self.rows, self.summary, self.ended, self.broken = [], {}, {}, [], broken
        _module(monkeypatch, "wandb", init=self.init, Settings=lambda **given: SimpleNamespace(**given))

    def _called(self, call: str, **given: Any) -> None:
        self.calls.append((call, given))
        if call == self.broken:
            raise OSError("the server is away\nlong trace")

    def init(self, **given: Any) -> Any:
        self._called("init", **given)
        rows = self.rows.setdefault(given["id"], [])

        def log(data, step=None):
            self._called("log", data=data, step=step)
            rows.append((step, data))

        def finish(exit_code=None):
            self._called("finish", exit_code=exit_code)
            self.ended.append(exit_code)

        return SimpleNamespace(log=log, finish=finish, summary=self.summary)


class Mlflow:
    """`metrics`: {run id: [(key, value, timestamp, step)]}."""

    def __init__(self, monkeypatch, broken: str = ""):
        self.calls, self.metrics, self.params, self.status, self.broken = [], {}, {}, {}, broken
        self.experiments: dict[str, str] = {}
        metric = lambda key, value, timestamp, step: (key, value, timestamp, step)  # noqa: E731
        mlflow = _module(monkeypatch, "mlflow", MlflowClient=self.client)
        mlflow.entities = _module(monkeypatch, "mlflow.entities", Metric=metric, Param=lambda key, value: (key, value))

    def client(self, tracking_uri):
        self.calls.append(("MlflowClient", {"tracking_uri": tracking_uri}))
        return self

    def _called(self, name: str, *args: Any, **given: Any) -> None:
        self.calls.append((name, (args, given)))
        if name == self.broken:
            raise OSError("the server is away")

    def get_experiment_by_name(self, name):
        self._called("get_experiment_by_name", name)
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name):
        self._called("create_experiment", name)
        return self.experiments.setdefault(name, str(len(self.experiments)))

    def create_run(self, experiment_id, tags, run_name):
        self._called("create_run", experiment_id, tags=tags, run_name=run_name)
        number = f"run{len(self.status)}"
        self.status[number], self.metrics[number], self.params[number] = "RUNNING", [], {}
        return SimpleNamespace(info=SimpleNamespace(run_id=number))

    def update_run(self, run_id, status):
        self._called("update_run", run_id, status=status)
        self.status[run_id] = status

    def log_batch(self, run_id, metrics=(), params=()):
        self._called("log_batch", run_id, metrics=metrics, params=params)
        assert len(metrics) <= 1000 and len(params) <= 100 and all(len(value) <= 500 for _, value in params)
        self.metrics[run_id] += metrics
        self.params[run_id] |= dict(params)

    def set_terminated(self, run_id, status):
        self._called("set_terminated", run_id, status)
        self.status[run_id] = status
