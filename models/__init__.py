"""Finds methods by file name: `models/<name>.py` holds a `Settings` and a `Learner`, nothing is registered anywhere."""

from __future__ import annotations

import ast
import importlib
import sys
import types
from functools import cache
from pathlib import Path

from utils.config import Experiment

_FOLDER = Path(__file__).parent
_LIGHT = ("__future__", "collections", "dataclasses", "typing", "pydantic", "utils.config")


def available() -> list[str]:
    """Names of all methods, sorted."""
    return sorted(p.stem for p in _FOLDER.glob("*.py") if p.stem not in ("__init__", "base"))


def learner_of(name: str) -> type:
    """The method's Learner class; imports torch."""
    return importlib.import_module(f"models.{name}").Learner


@cache
def settings_of(name: str) -> type[Experiment]:
    """The method's Settings class, read from its file without running the rest of it.

    A learner imports torch, which takes seconds, and a misspelt key should be refused in a fraction of one. So only the
    light imports, the plain assignments above the class and `class Settings` itself are executed.
    Raises ValueError if the file has no such class."""
    path = _FOLDER / f"{name}.py"
    kept: list[ast.stmt] = []
    for node in ast.parse(path.read_text(encoding="utf-8"), str(path)).body:
        module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        if isinstance(node, ast.Import):
            module = node.names[0].name
        if isinstance(node, ast.ClassDef) and node.name == "Settings":
            kept.append(node)
            break
        if isinstance(node, ast.Assign | ast.AnnAssign) or any(
            module == m or module.startswith(m + ".") for m in _LIGHT
        ):
            kept.append(node)
    else:
        raise ValueError(f"{path}: a method file must define `class Settings(Experiment)` at its top level")
    light = types.ModuleType(f"models._settings.{name}")
    sys.modules[light.__name__] = light  # pydantic resolves annotations through it
    exec(compile(ast.Module(kept, []), str(path), "exec"), light.__dict__)
    return light.__dict__["Settings"]
