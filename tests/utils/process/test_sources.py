"""Sources: what a method imports, what is in no commit, and that it comes back."""

import shlex
import subprocess

import pytest

from utils.process import machine, sources
from utils.report import tables


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A small program under git."""
    root = tmp_path / "a program"
    texts = {
        "main.py": "", "models/__init__.py": "", "models/mine.py": "import torch\nfrom models.parts import a, nothing\n",
        "models/parts/__init__.py": "", "models/parts/a.py": "def f():\n    from backbone import b\n",
        "backbone/b.py": "from utils.run import log\n", "utils/run/log.py": "", "models/other.py": "",
    }  # fmt: skip
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", "x")):
        subprocess.run(["git", *words], cwd=root, check=True)
    monkeypatch.setattr(machine, "ROOT", root)
    return root


def test_a_method_depends_on_what_it_imports(checkout):
    digests = sources.digests(["models/mine.py", "models/absent.py"], checkout)
    package = ["models/parts/__init__.py", "models/parts/a.py"]
    assert list(digests) == ["backbone/b.py", "models/__init__.py", "models/mine.py", *package]
    (checkout / "models" / "other.py").write_text("x = 1\n")
    assert sources.digests(["models/mine.py"], checkout) == digests
    (checkout / "models" / "new.py").write_text("from .parts.a import f\nimport backbone.b as b\n")
    relative = sources.digests(["models/new.py"], checkout)
    assert list(relative) == ["backbone/b.py", "models/__init__.py", "models/new.py", *package]
    (checkout / "models" / "parts" / "a.py").write_text("not Python (")
    changed = sources.digests(["models/mine.py"], checkout)
    assert changed["models/parts/a.py"] != digests["models/parts/a.py"] and "backbone/b.py" not in changed


def test_what_is_in_no_commit_is_named_saved_and_brought_back(checkout, tmp_path, monkeypatch):
    assert machine._git() == {"commit": machine._git()["commit"], "dirty": False, "untracked": []}
    (checkout / "models" / "lwf.py").write_text("new = 1\n")
    (checkout / ".git" / "info" / "exclude").write_text("lwf.py\n")  # an ignored file is part of the program as well
    (checkout / "notes.txt").write_text("no part of the program\n")
    (checkout / "models" / "mine.py").write_text("changed = 1\n")
    monkeypatch.setattr("sys.argv", ["main.py", "--config", str(checkout / "mine.json")])
    (checkout / "mine.json").write_text("{}")
    git = machine._git()
    assert git["dirty"] and git["untracked"] == ["mine.json", "models/lwf.py"]
    saved = sources.save(tmp_path / "run" / "source", git["untracked"], checkout)
    environment = {"git": git, "source": saved, "command": "true"}
    lines = tables.again(environment)
    assert "lwf.py" in tables.code_notes({}, environment)[0].text
    clean = tmp_path / "clean"
    subprocess.run(["git", "clone", "-q", str(checkout), str(clean)], check=True)
    commands = "\n".join(line for line in lines if "pip" not in line)
    subprocess.run(["sh", "-ec", commands], cwd=clean, check=True, capture_output=True)
    for name in ("models/lwf.py", "models/mine.py", "mine.json"):
        assert (clean / name).read_text() == (checkout / name).read_text()
    assert shlex.split(lines[1])[2] == saved["patch"]
    assert sources.save(tmp_path / "none", [], clean.parent / "clean") != {}  # the patch is there in the clone as well
    subprocess.run(["git", "checkout", "-q", "."], cwd=clean, check=True)
    assert sources.save(tmp_path / "none", [], clean) == {} and not (tmp_path / "none").exists()


def test_the_cell_of_a_sweep_is_the_programs_file(checkout, monkeypatch):
    """The program writes it below the runs, from a file that is named; config.json has its settings."""
    cell = checkout / "logs" / "mine" / "sweep_0123456789ab" / "cells" / "2" / "mine.json"
    cell.parent.mkdir(parents=True)
    cell.write_text("{}")
    monkeypatch.setattr("sys.argv", ["main.py", "--config", str(cell)])
    assert machine._git() == {"commit": machine._git()["commit"], "dirty": False, "untracked": []}
