"""wandb and mlflow get every row once, also of a resumed run; what fails there costs no run; unused they are not imported."""

import importlib.util
import inspect
import json
import sys

import pytest

import main
from tests.helpers.runs import rows_of, stopped_again_and_again, tiny_experiment
from tests.helpers.trackers import Mlflow, Wandb
from utils.run import tracker
from utils.run.log import RunLog
from utils.run.mirror import About, scalars


def points(rows):
    """What a service must have of these rows: [(step, tag, value)]."""
    return [(n, tag, value) for n, row in enumerate(rows) for tag, value in scalars(row)]


def sent(fake) -> list[tuple[int, str, float]]:
    """[(step, tag, value)] of the service's only run, without times and the figures at the end."""
    if isinstance(fake, Wandb):
        (rows,) = fake.rows.values()
        found = [(step, tag, value) for step, values in rows for tag, value in values.items()]
    else:
        (metrics,) = fake.metrics.values()
        found = [(step, key, value) for key, value, _, step in metrics]
    return [point for point in found if point[1] != "seconds" and not point[1].startswith("final/")]


@pytest.mark.parametrize(("name", "kind"), [("wandb", Wandb), ("mlflow", Mlflow)])
def test_a_run_that_is_stopped_again_and_again_has_every_row_once(name, kind, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    fake, out = kind(monkeypatch), tmp_path / "logs"
    run = tiny_experiment("finetune", tmp_path, monkeypatch, tracker=name, batch_size=8)
    code, stops = stopped_again_and_again(run, out, monkeypatch)
    assert code == 0 and stops > 1
    (folder,) = out.glob("finetune/*/seed_3")
    rows, found = rows_of(folder), sent(fake)
    timed = ("seconds", "per_second")  # a row that was written again keeps its first times there
    assert [point[:2] for point in found] == [point[:2] for point in points(rows)]
    assert {p for p in found if not p[1].endswith(timed)} == {p for p in points(rows) if not p[1].endswith(timed)}
    results = json.loads((folder / "results.json").read_text())
    title, words = (
        f"finetune/{folder.parent.name}/seed_3",
        {"method": "finetune", "dataset": "digits", "backbone": "embedded"},
    )
    if name == "wandb":
        starts = [given for call, given in fake.calls if call == "init"]
        assert len({given["id"] for given in starts}) == 1 < len(starts) == stops + 1
        assert starts[0]["name"] == title and starts[0]["group"] == "finetune" and starts[0]["dir"] == str(folder)
        assert starts[0]["config"]["batch_size"] == 8 and starts[0]["config"]["seed"] == 3
        assert {f"{key}={value}" for key, value in words.items()} < set(starts[0]["tags"])
        assert fake.summary["final/last_accuracy"] == results["last_accuracy"]
        assert fake.ended == [1] * stops + [0]
    else:
        (made,) = [given for call, given in fake.calls if call == "create_run"]
        assert made[1]["run_name"] == title and words.items() < made[1]["tags"].items()
        assert fake.params["run0"]["batch_size"] == "8" and fake.status == {"run0": "FINISHED"}
        final = {key: value for key, value, _, step in fake.metrics["run0"] if step == len(rows) - 1}
        assert final["final/last_accuracy"] == results["last_accuracy"]
        assert fake.calls[0] == ("MlflowClient", {"tracking_uri": f"sqlite:///{out.absolute() / 'mlflow.db'}"})


def test_rows_from_before_the_tracker_are_sent_too(tmp_path, monkeypatch):
    folder = tmp_path / "e" / "hash" / "seed_1"
    with RunLog(folder, console=False) as log:
        for value in (1.0, 2.0):
            log.row("epoch", loss=value)
    fake = Wandb(monkeypatch)
    for kept in (2, 1):  # a second process cuts the last row away and writes it again
        with RunLog(folder, console=False) as log:
            log.truncate_rows(kept)
            log.mirror = tracker.of("wandb", About(folder, {}, {}), log.rows, log.warn)
            log.row("epoch", loss=3.0)
    assert sent(fake) == [(0, "epoch/loss", 1.0), (1, "epoch/loss", 2.0), (2, "epoch/loss", 3.0)]
    assert json.loads((folder / "tracker.json").read_text())["wandb"]["rows"] == 3


SAID = "tracker wandb failed (the server is away): the run goes on without it; metrics.jsonl has every number"


def test_a_tracker_that_fails_is_named_once_and_costs_no_run(tmp_path, monkeypatch, capsys):
    Wandb(monkeypatch, broken="log")
    run = tiny_experiment("simplecil", tmp_path, monkeypatch, tracker="wandb")
    assert main.main([*run, "--out", str(tmp_path / "logs")]) == 0
    said = capsys.readouterr().err
    assert said.count(SAID) == 1 and "long trace" not in said
    (folder,) = (tmp_path / "logs").glob("simplecil/*/seed_3")
    assert (folder / "results.json").is_file() and len(rows_of(folder)) == 2


@pytest.mark.parametrize("broken", ["init", "finish"])
def test_so_is_one_that_fails_at_the_start_or_the_end(broken, tmp_path, monkeypatch, capsys):
    Wandb(monkeypatch, broken)
    folder = tmp_path / "e" / "hash" / "seed_1"
    with RunLog(folder) as log:
        log.mirror = tracker.of("wandb", About(folder, {}, {}), log.rows, log.warn)
        log.row("epoch", loss=1.0)
        log.mirror.finish({"last_accuracy": 1.0})
    assert capsys.readouterr().err.count(SAID) == 1 and len(rows_of(folder)) == 1


class Refusing:
    """A finder that raises where a tracker's package is imported."""

    def find_spec(self, name, *_):
        assert name.partition(".")[0] not in tracker.PACKAGES, f"{name} was imported"


def test_without_a_tracker_no_package_of_one_is_imported(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in (*tracker.PACKAGES, "utils.run.services")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Refusing(), *sys.meta_path])
    run = tiny_experiment("simplecil", tmp_path, monkeypatch)
    assert main.main([*run, "--out", str(tmp_path / "logs")]) == 0


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_missing_is_named_with_the_command(name, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked, *a: None if asked == name else real(asked, *a))
    assert f"needs the package {name}" in tracker.missing(name)
    assert "pip install -r requirements-trackers.txt" in tracker.missing(name)


def test_the_real_packages_take_these_calls(tmp_path, monkeypatch):
    real = {name: importlib.util.find_spec(name) for name in ("wandb", "mlflow")}
    if not any(real.values()):
        pytest.skip("pip install -r requirements-trackers.txt: the packages are optional")
    signatures = {}
    if real["wandb"]:
        import wandb

        signatures["wandb"] = {"init": wandb.init, "log": wandb.Run.log, "finish": wandb.Run.finish}
        assert wandb.Settings(console="off", silent=True)
    if real["mlflow"]:
        import mlflow

        signatures["mlflow"] = vars(mlflow.MlflowClient) | {"MlflowClient": mlflow.MlflowClient}
    for name, functions in signatures.items():
        with monkeypatch.context() as patch:
            fake = {"wandb": Wandb, "mlflow": Mlflow}[name](patch)
            folder = tmp_path / name / "e" / "hash" / "seed_1"
            with RunLog(folder, console=False) as log:
                about = About(folder, {"lr": 0.1}, {"method": "m"})
                log.mirror = tracker.of(name, about, log.rows, pytest.fail)
                log.row("epoch", loss=3.0)
                log.mirror.finish({"last_accuracy": 1.0})
        assert len(fake.calls) >= 3
        for call, given in fake.calls:
            args, keywords = given if isinstance(given, tuple) else ((), given)
            first = () if call in ("init", "MlflowClient") else (None,)  # self
            inspect.signature(functions[call]).bind(*first, *args, **keywords)
