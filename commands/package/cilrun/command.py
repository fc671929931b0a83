"""The command `cilrun`: `python main.py` of the repository that was installed with `pip install -e`, from any folder."""

from __future__ import annotations

import os
import subprocess
import sys

from cilrun import ROOT


def main() -> None:
    """Becomes `python main.py` with the flags of this command."""
    words = [sys.executable, str(ROOT / "main.py"), *sys.argv[1:]]
    if os.name == "posix":
        os.execv(words[0], words)
    sys.exit(subprocess.run(words).returncode)
