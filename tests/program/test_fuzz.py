"""Every shipped experiment file, mutated over and over: `--check` accepts it or says by name what is wrong, within seconds."""

import random

import pytest

pytest.importorskip("resource", reason="memory limits are POSIX")
from benchmarks import fuzz

PER_FILE = -(-1000 // len(fuzz.FILES))


@pytest.mark.slow
@pytest.mark.parametrize("path", fuzz.FILES, ids=lambda path: path.stem)
def test_a_mutant_is_accepted_or_refused_by_name(path, tmp_path):
    answers = {}
    for number, mutant in enumerate(fuzz.mutants(path, PER_FILE, seed=1)):
        folder = tmp_path / str(number)
        folder.mkdir()
        answers[f"{mutant.kind}, {mutant.what}"] = fuzz.judge(mutant, folder)[0]
    assert {what: said for what, said in answers.items() if said not in ("accepted", "refused")} == {}
    assert "refused" in answers.values()


def test_a_seed_stands_for_its_mutants():
    one, two = ([*fuzz.mutants(fuzz.FILES[0], 30, seed)] for seed in (1, 1))
    assert one == two != [*fuzz.mutants(fuzz.FILES[0], 30, 2)]
    assert {mutant.kind for mutant in one} == set(fuzz.MUTATIONS)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("raise KeyError('x')", "KeyError: 'x'"),
        ("return 1", "exit code 1"),
        ("raise SystemExit(2)", "SystemExit: 2"),
        ("print('error: nothing', file=sys.stderr); return 2", "exit code 2: error: nothing"),
        ("print(f'error: {argv[1]}: batch_sizes', file=sys.stderr); return 2", "does not name"),
        (r"print(f'error: {argv[1]}: batch_size \x1b[31m', file=sys.stderr); return 2", "not readable"),
        ("open(argv[1] + '.out', 'w').close(); return 0", "it wrote files"),
        ("fuzz.LIMIT = -1; return 0", "it took"),
        ("print(f'error: {argv[1]}: batch_size is odd', file=sys.stderr); return 2", "refused"),
    ],
)
def test_a_fault_of_the_program_would_be_found(answer, found, tmp_path, monkeypatch):
    made = {}
    exec(f"import sys\nfrom benchmarks import fuzz\ndef main(argv):\n    {answer}", made)
    monkeypatch.setattr(fuzz.program, "main", made["main"])
    monkeypatch.setattr(fuzz, "LIMIT", fuzz.LIMIT)
    mutant = fuzz.Mutant("key missing", "x", b"{}", (fuzz.pattern("batch_size"),))
    assert found in fuzz.judge(mutant, tmp_path)[0]


def test_misspelt_keys_differ():
    draw = random.Random(0)
    assert all(fuzz.misspelt("seed", draw) != "seed" for _ in range(500))
