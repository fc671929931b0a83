"""The lists of packages: every bound is stated, and the tested set satisfies them."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LISTS = (
    "requirements.txt",
    "requirements-dev.txt",
    "requirements-slurm.txt",
    "requirements-onnx.txt",
    "requirements-ray.txt",
    "requirements-trackers.txt",
)


def requirements(name):
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


@pytest.mark.parametrize("name", LISTS)
def test_every_requirement_has_a_lowest_and_a_highest_version(name):
    for requirement in requirements(name):
        assert {clause.operator for clause in requirement.specifier} == {">=", "<"}, requirement


def test_the_locked_set_satisfies_every_requirement():
    locked = {}
    for requirement in requirements("requirements-lock.txt"):
        (clause,) = requirement.specifier
        assert clause.operator == "==" and "*" not in clause.version and "+" not in clause.version, requirement
        locked[canonicalize_name(requirement.name)] = clause.version
    for name in LISTS[:4]:  # Ray and the trackers are installed by who wants them
        for requirement in requirements(name):
            assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement
    assert not [name for name in locked if name.startswith(("nvidia", "cuda", "triton"))], "torch brings its own"
