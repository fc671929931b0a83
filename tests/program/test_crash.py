"""Real kills: a run's process dies by SIGKILL at random moments, and the run ends as if it had not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
# with processes that decode images. tests/contract/test_resume.py kills every method at every write; benchmarks/crash.md has
# random kills of every method
CASES = [("finetune", 2, 3)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the benchmark forks")
@pytest.mark.parametrize(("method", "workers", "kills"), CASES)
def test_killed_at_random_moments_nothing_is_lost(method, workers, kills):
    command = [sys.executable, "-m", "benchmarks.crash", "--no-report", "--classes", "4", "--kills", str(kills)]
    command += ["--workers", str(workers), "--methods", method]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ") and "| method" not in line]
    assert [row[0].removeprefix("| ") for row in rows] == [method] and int(rows[0][2]) >= kills
