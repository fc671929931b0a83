"""Holds our learners to recorded runs of the original code: every loss, logit and weight, to 1e-9 in float64.

Runs every NAME.json + NAME.npz under PARITY_DIR/<method>/ (default: tests/fixtures/parity) through
tests/contract/parity/<method>.py; folders of methods that do not exist yet are skipped by name. The real learner learns.
"""

import importlib.util
import os
from pathlib import Path

import pytest

import models
from tests.helpers.recorded import Recorded

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("PARITY_DIR", HERE.parent / "fixtures" / "parity"))
PAIRS = sorted(p for p in FOLDER.glob("*/*.json") if p.with_suffix(".npz").is_file())
CHECKS = {p.stem: p for p in sorted((HERE / "parity").glob("*.py"))}


def test_reference_runs_are_there():
    assert {p.parent.name for p in PAIRS} >= set(CHECKS) or "PARITY_DIR" in os.environ
    assert PAIRS, f"no reference runs under {FOLDER}"


@pytest.mark.parametrize("path", PAIRS, ids=[f"{p.parent.name}/{p.stem}" for p in PAIRS])
def test_equals_the_original(path, tmp_path, monkeypatch):
    method = path.parent.name
    if method not in models.available():
        pytest.skip(f"{method} is not built yet")
    assert method in CHECKS, f"{method} exists and has reference runs, but tests/contract/parity has no check of them"
    spec = importlib.util.spec_from_file_location(f"parity_{method}", CHECKS[method])
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    check.check(Recorded(path), tmp_path, monkeypatch)
