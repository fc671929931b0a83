"""Real kills: processes of several methods die by SIGKILL at random moments, and the run ends as if they had not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
# one that grows and one that trains the whole network; tests/contract/test_resume.py kills every method at every write
METHODS = ["sema", "slca"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the benchmark forks")
@pytest.mark.parametrize(("methods", "workers", "kills"), [(METHODS, 0, 4), (["finetune"], 2, 5)])
def test_killed_at_random_moments_nothing_is_lost(methods, workers, kills):
    command = [sys.executable, "-m", "benchmarks.crash", "--no-report", "--classes", "4", "--kills", str(kills)]
    command += ["--workers", str(workers), "--methods", *methods]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ") and "| method" not in line]
    assert [row[0].removeprefix("| ") for row in rows] == methods and all(int(row[2]) >= kills for row in rows)
