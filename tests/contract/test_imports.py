"""Imports go down one table of packages, importing has no effect, and nothing is ever unpickled."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("backbone", "commands", "models", "utils")
INSTALLED = ROOT / "commands" / "package"  # on sys.path where the program is installed, so its module is called cilrun

# The floors of the house, from the ground up: what a package may import. A line names only packages of lines above it, so
# no circle can arise between packages. "utils" and "backbone" with a star stand for every package of that folder above.
FLOORS = {
    "utils.text": "",
    "utils.process": "utils.text",
    "utils.files": "utils.text",
    "utils.data.shipped": "",
    "utils.data": "utils.process utils.files utils.text",
    "utils.config": "utils.data utils.text",
    "utils.evaluation": "utils.data utils.process utils.text",
    "utils.run": "utils.config utils.evaluation utils.data utils.process utils.files utils.text",
    "utils.report": "utils.run utils.config utils.evaluation utils.data utils.process utils.files utils.text",
    "utils.compare": "utils.report utils.run utils.config utils.evaluation utils.files utils.text",
    "utils.engines": "utils.config utils.files utils.process utils.text",
    "backbone": "utils.config utils.data utils.files utils.process utils.text",
    "backbone.adapters": "backbone utils.config utils.files utils.text",
    "backbone.experts": "backbone backbone.adapters utils.process",
    "backbone.heads": "backbone utils.process",
    "backbone.prompts": "backbone utils.process",
    "backbone.pretrain": "backbone utils.data utils.process",
    "models.settings": "utils.config utils.text",
    "models.learner": "backbone.* utils.run utils.config utils.data utils.process utils.files utils.text",
    "models.families": "models.learner models.settings backbone.* utils.data utils.process utils.text",
    "models": "models.families models.learner models.settings backbone.* utils.config utils.data utils.process utils.text",
    "commands": "models models.learner backbone.* utils.*",
    "cilrun": "",  # imports nothing under the names above
    "main": "commands models models.learner backbone.* utils.*",
}


def module_name(path: Path) -> str:
    root = INSTALLED if path.is_relative_to(INSTALLED) else ROOT
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(p): p for p in [ROOT / "main.py", *(q for f in FOLDERS for q in sorted((ROOT / f).rglob("*.py")))]}
PACKAGES = sorted({p.parent for p in FILES.values()} - {ROOT} | {ROOT / "benchmarks"})


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def package_of(module: str) -> str:
    """The line of FLOORS that a module stands on: its folder, and for utils/text.py and main.py the file itself."""
    return module if module in FLOORS else module_name(FILES[module].parent / "__init__.py")


@cache
def imports_of(module: str) -> frozenset[str]:
    """Every module that a file names in an import, also inside functions and under TYPE_CHECKING."""
    names = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: a relative import hides its direction"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if name in FILES else str(node.module) for name in inner}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {str(a.value) for a in node.args if isinstance(a, ast.Constant) and a.value in FILES}
    return frozenset(names)


def allowed(package: str) -> set[str]:
    above = list(FLOORS)[: list(FLOORS).index(package)]
    names: set[str] = set()
    for word in FLOORS[package].split():
        folder = word.removesuffix(".*")
        names |= {word} if folder == word else {p for p in above if p == folder or p.startswith(f"{folder}.")}
    assert names <= set(above), f"{package} may not import {names - set(above)}: they stand below it in the table"
    return names


def test_every_import_goes_down_the_table():
    assert {package_of(module) for module in FILES} - {"utils"} == set(FLOORS)
    wrong = [
        f"{module} imports {name}: {package_of(module)} may not import {package_of(name)}"
        for module in FILES
        for name in sorted(imports_of(module) & set(FILES))
        if package_of(name) not in allowed(package_of(module)) | {package_of(module)}
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circle_of_files():
    graph = {module: imports_of(module) & set(FILES) - {module} for module in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_no_method_imports_another():
    methods = {module for module in FILES if re.fullmatch(r"models\.\w+", module) and package_of(module) == "models"}
    methods -= {p for p in FLOORS if p.startswith("models.")}
    assert len(methods) > 10
    assert not {module: found for module in methods if (found := imports_of(module) & methods)}


def test_the_program_imports_no_test_and_no_benchmark():
    outside = {"tests", "benchmarks", "conftest"}
    assert not [m for m in FILES if {name.partition(".")[0] for name in imports_of(m)} & outside]


def test_every_file_says_what_it_is_for():
    first = {module: (ast.get_docstring(tree_of(module)) or "").partition("\n")[0] for module in FILES}
    assert not [m for m, line in first.items() if len(line) <= 20 or not line.endswith((".", ":"))]


def test_every_folder_says_what_lives_there_and_what_it_may_and_may_not_import():
    """Its `__init__.py` does: a sentence, then "May import ...; never ..."."""
    silent = []
    for folder in PACKAGES:
        path = folder / "__init__.py"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        first, *rest = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")
        rule = re.search(r"May import [^;]{5,}; never [^;]{5,}\.", " ".join("\n".join(rest).split()))
        if len(first) <= 20 or not rule:
            silent.append(str(path.relative_to(ROOT)))
    assert not silent


def test_nothing_is_unpickled():
    wrong = []
    for module in FILES:
        if {name.partition(".")[0] for name in imports_of(module)} & {
            "dill",
            "joblib",
            "shelve",
            "marshal",
            "cloudpickle",
        }:
            wrong.append(module)
        for node in ast.walk(tree_of(module)):
            if not isinstance(node, ast.Call):
                continue
            called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            # CIFAR's python files go through a subclass of Unpickler that builds arrays and nothing else
            unpickles = called in ("pickle.load", "pickle.loads", "pickle.Unpickler")
            unpickles |= called == "torch.load" and keywords.get("weights_only") != "True"
            unpickles |= keywords.get("allow_pickle") not in (None, "False")
            if unpickles:
                wrong.append(f"{module}:{node.lineno}")
    assert not wrong


HEAVY = ("torch", "timm", "torchvision", "matplotlib", "sklearn", "safetensors")
LIGHT = (
    "main",
    "models",
    "backbone.catalogue",
    "utils.config.schema",
    "commands.options",
    "utils.data",
    "utils.report.console",
    "utils.process.machine",
)


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module):
    code = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


def test_importing_everything_has_no_effect():
    """No output, no files, no random numbers drawn, no threads or global settings changed."""
    code = f"""
import importlib, os, random, sys, tempfile
import numpy, torch
os.chdir(tempfile.mkdtemp())
def state():
    return (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.get_num_threads(),
            torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
            dict(os.environ), os.listdir())
before = state()
for name in {list(FILES)}:
    importlib.import_module(name)
assert state() == before
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(INSTALLED)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
