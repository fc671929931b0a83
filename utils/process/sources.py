"""The program's source files: those that a method imports, their digests, and what of them is in no commit.

A commit alone does not name the code of a run: files may be changed, or new and not in git at all. `uncommitted` lists both,
and `save` puts them into a run folder, from where `git apply` and `cp` bring them back.
"""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ("main.py", "models", "backbone", "utils", "commands")  # where every Python file is part of the program
RESTORED = (*PROGRAM, "exps", "requirements.txt", "pyproject.toml")  # what a saved patch covers
# Packages that decide no number: what imports them does not depend on their text.
WITHOUT_NUMBERS = (
    *("commands", "tests", "benchmarks", "utils.report", "utils.compare", "utils.engines"),
    *("utils.files", "utils.run", "utils.config", "utils.text", "utils.process"),
)
MOST_BYTES = 20_000_000  # of a patch or of an untracked file that is saved


def digests(starts: Iterable[str], root: Path = ROOT) -> dict[str, str]:
    """{path below `root`: 16 hex digits of SHA-256} of the files `starts` and of every file below `root` that they import,
    also inside functions; packages in WITHOUT_NUMBERS are left out. A file that is not there is left out."""
    waiting, files = [root / start for start in starts], dict[str, str]()
    while waiting:
        path = waiting.pop()
        name = path.relative_to(root).as_posix()
        if name in files or not path.is_file():
            continue
        content = path.read_bytes()
        files[name] = hashlib.sha256(content).hexdigest()[:16]
        if path.suffix == ".py":
            waiting += [path.parent / "__init__.py", *_imported(content, path, root)]
    return dict(sorted(files.items()))


@cache
def at_start(starts: tuple[str, ...]) -> dict[str, str]:
    """`digests`, as this process found them first: files may be edited while it computes with what it has imported."""
    return digests(starts)


def _imported(content: bytes, path: Path, root: Path) -> Iterator[Path]:
    """The files below `root` that the source `content` of `path` names in an import."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return  # whoever imports it says so
    package = path.parent.relative_to(root).parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            modules = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for module in modules:
            if not any(module == name or module.startswith(f"{name}.") for name in WITHOUT_NUMBERS):
                place = root.joinpath(*module.split("."))
                yield from (file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file())


def git(*words: str, root: Path = ROOT) -> bytes:
    """What a git command prints. Raises OSError or subprocess.SubprocessError."""
    # GIT_OPTIONAL_LOCKS=0: `git status` must not write to the index beside a user's own git command
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, timeout=60, check=True, env=environment).stdout


def _lines(output: bytes) -> list[str]:
    return [os.fsdecode(name) for name in output.split(b"\0") if name]


def uncommitted(root: Path = ROOT, also: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """(tracked files that differ from the commit, Python files of the program that git does not track, ignored ones too).

    `also`: further files below `root`, such as an experiment file, that count where git does not track them."""
    changed = _lines(git("diff", "HEAD", "--name-only", "-z", root=root))
    others = _lines(git("ls-files", "--others", "-z", "--", *PROGRAM, *also, root=root))
    return changed, [name for name in others if name.endswith(".py") or name in also]


def save(folder: Path, untracked: Sequence[str], root: Path = ROOT) -> dict[str, str]:
    """Writes `changes.patch` (tracked files against the commit) and `files/` (copies of the untracked ones) to `folder`,
    in place of what an earlier process wrote there. Returns the paths of what there was to write: "patch", "files"."""
    shutil.rmtree(folder, ignore_errors=True)
    present = [name for name in RESTORED if (root / name).exists()]
    patch = git("diff", "HEAD", "--binary", "--", *present, root=root)
    if patch and len(patch) <= MOST_BYTES:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "changes.patch").write_bytes(patch)
    for name in untracked:
        if (root / name).is_file() and (root / name).stat().st_size <= MOST_BYTES:
            (folder / "files" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, folder / "files" / name)
    return {
        key: str(path)
        for key, path in (("patch", folder / "changes.patch"), ("files", folder / "files"))
        if path.exists()
    }
