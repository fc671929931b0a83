"""The methods, one file each: `models/<name>.py` holds a `Settings` and a `Learner`; its name is the method's name.

May import models.learner, models.families, models.settings, backbone with its packages, utils.config, utils.data,
utils.process and utils.text; never another method, utils.run, the report or a command.
"""

from __future__ import annotations

import ast
import importlib
import sys
import types
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config.schema import Experiment

if TYPE_CHECKING:
    from backbone.vit import SlottedViT
    from models.learner.base import Learner

_FOLDER = Path(__file__).parent
# quick to import, so a Settings class may use them and is still read without the rest of its file
_LIGHT = tuple(f"{name}." for name in (*sys.stdlib_module_names, "pydantic", "utils.config", "models.settings"))


def available() -> list[str]:
    """Names of all methods, sorted."""
    return sorted(p.stem for p in _FOLDER.glob("*.py") if p.stem != "__init__")


def summaries() -> dict[str, str]:
    """Each method with the first line of its file's docstring, or with the fault for which its file cannot be read."""

    def summary(name: str) -> str:
        try:
            return (ast.get_docstring(_parse(name)) or "").partition("\n")[0]
        except ValueError as error:
            return f"cannot be used: {error}"

    return {name: summary(name) for name in available()}


def learner_of(name: str) -> type:
    """The method's Learner class; imports torch. Raises ValueError if the file has none."""
    try:
        return importlib.import_module(f"{__name__}.{name}").Learner
    except AttributeError:
        raise ValueError(f"{_FOLDER / name}.py: a method file must define `class Learner` at its top level") from None


def build(cfg: Experiment, backbone: SlottedViT, num_classes: int, seed: int, log: Any) -> Learner:
    """The learner of the method `cfg.model_name` for `num_classes` classes in all; `seed` decides its start values.

    Over a backbone on the meta device it has shapes and no values. `log`: the run's RunLog, None to read a finished run."""
    from models.learner.start_values import SeededInit

    return learner_of(cfg.model_name)(cfg, backbone, num_classes, SeededInit(seed), log)


@cache
def settings_of(name: str) -> type[Experiment]:
    """The method's Settings class, read from its file without running the rest of it.

    A learner imports torch, which takes seconds, and a misspelt key should be refused in a fraction of one. So only the
    light imports and the definitions above `class Settings` are executed. If the class needs more than that, the whole
    file is imported. Raises ValueError if the file has no such class."""
    light: list[ast.stmt] = []
    heavy: set[str] = set()  # names that only the whole file would bind
    for node in _parse(name).body:
        needs = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        if isinstance(node, ast.ClassDef) and node.name == "Settings":
            settings = None if (needs | {"*"}) & heavy else _run(name, [*light, node])["Settings"]
            if settings is None or not settings.__pydantic_complete__:
                settings = importlib.import_module(f"{__name__}.{name}").Settings
            return settings
        if _is_light(node) and not needs & heavy:
            light.append(node)
        else:
            heavy |= _bound(node)
    raise ValueError(f"{_FOLDER / name}.py: a method file must define `class Settings(Experiment)` at its top level")


def _parse(name: str) -> ast.Module:
    path = _FOLDER / f"{name}.py"
    try:
        return ast.parse(path.read_text(encoding="utf-8"), str(path))
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None


def _is_light(node: ast.stmt) -> bool:
    """Whether a statement can be executed without importing anything heavy, judged by its kind alone."""
    if isinstance(node, ast.Import):
        return all(f"{alias.name}.".startswith(_LIGHT) for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return not node.level and f"{node.module}.".startswith(_LIGHT)
    return isinstance(node, ast.Assign | ast.AnnAssign | ast.FunctionDef | ast.ClassDef)


def _bound(node: ast.stmt) -> set[str]:
    """Names a statement binds, "*" for a star import."""
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names |= {n.name for n in ast.walk(node) if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    imports = (n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom))
    return names | {alias.asname or alias.name.partition(".")[0] for n in imports for alias in n.names}


def _run(name: str, body: list[ast.stmt]) -> dict[str, Any]:
    """Executes these statements of a method's file in a separate module; returns its names."""
    module = types.ModuleType(f"{__name__}._settings.{name}")
    sys.modules[module.__name__] = module  # pydantic resolves annotations through it
    exec(compile(ast.Module(body, []), str(_FOLDER / f"{name}.py"), "exec"), module.__dict__)
    return module.__dict__
