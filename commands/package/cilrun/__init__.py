"""The program as an installed package: `cilrun.load("logs/latest")`, `cilrun.models`, ..., and the command `cilrun`.

May import the program's packages under its own name (`cilrun.models`); never under theirs.

main.py runs with its folder first on sys.path, and its files say `from utils.text import printable`. Other projects have
modules called `utils` and `models` too. So each file is loaded here under `cilrun`, as `cilrun.utils.text`, and gets an
`__import__` that reads those names as names within `cilrun`. Nothing called `utils` or `models` appears in sys.modules.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.machinery
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[3]
NAMES = frozenset({"backbone", "benchmarks", "commands", "main", "models", "utils"})

if TYPE_CHECKING:
    import torch


def run(*flags: str) -> int:
    """What `python main.py FLAGS` does, in this process; returns its exit code."""
    return int(_module("main").main(list(flags)))


def load(folder: Path | str, **how: Any) -> Any:
    """A run as its newest checkpoint has it: `learner`, `stream` (its tasks and images), `record`; see commands/saved.py."""
    return _module("commands.saved").load(folder, **how)


def load_model(folder: Path | str, device: torch.device | None = None) -> Any:
    """What predicts of a run or an export, without its data: `learner`, `classes`, `recipe`; see commands/predict.py."""
    return _module("commands.predict").load(Path(folder), device)


def read_images(files: Sequence[Path | str], model: Any) -> torch.Tensor:
    """Image files as the input of `load_model`'s model: float32 [B, 3, S, S] in [0, 1]."""
    images: torch.Tensor = _module("utils.data.new_images").read(files, model.recipe)
    return images


def results(folder: Path | str) -> dict[str, Any]:
    """The results.json of a finished run, its digest compared. Raises ValueError if it is missing or changed."""
    values: dict[str, Any] = _module("utils.report.results").read(Path(folder), "results.json")
    return values


def rows(folder: Path | str) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, in order."""
    return list(_module("utils.report.results").load_rows(Path(folder) / "metrics.jsonl"))


# How the files are loaded under this name ------------------------------------------------------------------------------


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")


def _import(
    name: str,
    globals: Mapping[str, Any] | None = None,
    locals: Mapping[str, Any] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    """`__import__` of the program's files: a name of NAMES means the module of that name within this package."""
    head = name.partition(".")[0]
    if level or head not in NAMES:
        return builtins.__import__(name, globals, locals, fromlist or (), level)
    module = builtins.__import__(f"{__name__}.{name}", globals, locals, fromlist or (), 0)
    return module if fromlist else sys.modules[f"{__name__}.{head}"]  # `import utils.text` binds `utils`


class _Loader(importlib.machinery.SourceFileLoader):
    """Runs a file with `_import` in place of the usual `__import__`."""

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import}
        super().exec_module(module)


class _Finder:
    """Finds `cilrun.models` and what is below it in the program's folder."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        package, _, inner = name.partition(".")
        if package != __name__ or inner.partition(".")[0] not in NAMES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path if "." in inner else [str(ROOT)])
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            spec.loader = _Loader(name, spec.origin)
        return spec


if not (ROOT / "main.py").is_file():
    raise ImportError("cilrun works from its repository alone: pip install -e FOLDER, without a copy of the package")
if not any(type(finder).__name__ == _Finder.__name__ and finder.__module__ == __name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
