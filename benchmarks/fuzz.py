"""Mutates every shipped experiment file; each mutant must pass `--check` or be refused (exit code 2) by name of what is wrong.

`python -m benchmarks.fuzz [--mutants 3000] [--seed 0]` prints a Markdown report; exit code 1 if a mutant ended otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import main as program
import models
from utils.process.seeds import named_seed
from utils.text import CONTROL, printable

FILES = sorted((Path(__file__).resolve().parent.parent / "exps").glob("*.json"))
LIMIT = 10.0  # seconds of processor time for one --check: the wall clock of a shared machine says little
ROOM = 4 << 30  # bytes of address space that one --check may add
LONGEST = 10_000  # characters of a refusal, however long the keys in the file are
PLACE = r"line \d+|byte \d+|the file is empty"  # where a file is no JSON

Pairs = list[tuple[str, Any]]  # a file's keys and values; a list, since a mutant may have a key twice
# What was changed, the new content, and the keys concerned, of which a refusal must name one.
Mutated = tuple[str, Pairs | str | bytes, tuple[str, ...]]
Mutation = Callable[[Pairs, Random], Mutated]

TEXTS = ("", " ", "x", "0", "1e3", "null", "-1", "../..", "~nobody/x", "y" * 5_000, "z" * 200_000, "päth 数据", "\0",
         "\ud800", "a\nb", "\x1b[31mred", "random", "pretrained", "digits", "cuda:99", "cuda:" + "9" * 30)  # fmt: skip
NUMBERS = (0, -1, 1, 2, 3, 7, 255, 4096, 10**6, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 10**30, 0.0, -0.0,
           0.5, 1e-320, 1e308, -1e308, 1.5, 100.0, 2.0)  # fmt: skip
NESTED: tuple[Any, ...] = (
    [], {}, [[]], [None], [1, "a"], {"a": 1}, {"a": {"b": [1]}}, [0], [-1], [1.5], [2**63], ["0"], [True], [1, 1],
    [0, 1, 2], list(range(2_000)), list(range(100_000)), [0.1] * 5_000, ["0"] * 100_000, ["qkv"], ["qkv"] * 2,
)  # fmt: skip
# texts that do something where they are shown: a terminal, a page, a sheet, a paper, a shell
HOSTILE = ("\x1b]0;title\x07\x1b[2J", "\x9b31m", "\u202egpj.exe", "\u2066a\u2069", "a\r\nerror: b", "=cmd|'/c calc'!A0",
           "<script>alert(1)</script>", "[a](javascript:b)", "\\input{x}", "$(touch x)", "{{ 7 * 7 }}", "%s%n")  # fmt: skip
SHOWN = re.compile(
    r"[\u202a-\u202e\u2066-\u2069]"
)  # signs that reorder a line; other control characters: utils/text.py
OTHERS = (None, True, False, float("nan"), float("inf"), float("-inf"))
GROUPS = (OTHERS, TEXTS, NUMBERS, NESTED)


@dataclass(frozen=True)
class Mutant:
    """A refusal must contain the file's path and match one of the patterns `names`."""

    kind: str
    what: str
    content: bytes
    names: tuple[str, ...]


# Mutations -------------------------------------------------------------------------------------------------------------


def group_of(value: Any) -> tuple[Any, ...]:
    """The strange values of the same JSON type as `value`."""
    if value is None or isinstance(value, bool):
        return OTHERS
    return TEXTS if isinstance(value, str) else NUMBERS if isinstance(value, int | float) else NESTED


def extreme(value: Any, draw: Random) -> Any:
    """An extreme value of the same JSON type, or a number where the type has too few values."""
    group = group_of(value)
    return draw.choice(OTHERS + NUMBERS if group is OTHERS else group)


def foreign(value: Any, draw: Random) -> Any:
    return draw.choice(draw.choice([group for group in GROUPS if group is not group_of(value)]))


def misspelt(key: str, draw: Random) -> str:
    at = draw.randrange(len(key))
    ways = (key[:at] + key[at + 1 :], key[:at] + "x" + key[at:], key[: at + 1] + key[at:], key.upper(), f" {key}", "",
            key.replace("_", "-"), key * 3_000, f"{key}\0", f"\x1b[31m{key}", f"{key}\ud800", f"{key}é")  # fmt: skip
    return draw.choice([way for way in ways if way != key])


def missing(pairs: Pairs, draw: Random) -> Mutated:
    at = draw.randrange(len(pairs))
    return pairs[at][0], pairs[:at] + pairs[at + 1 :], (pairs[at][0],)


def doubled(pairs: Pairs, draw: Random) -> Mutated:
    key, value = draw.choice(pairs)
    return key, [*pairs, (key, draw.choice([value, extreme(value, draw)]))], (key,)


def renamed(pairs: Pairs, draw: Random) -> Mutated:
    at = draw.randrange(len(pairs))
    old, value = pairs[at]
    new = misspelt(old, draw)
    return f"{old} as {new[:60]}", [*pairs[:at], (new, value), *pairs[at + 1 :]], (new, old)


def replaced(make: Callable[[Any, Random], Any]) -> Mutation:
    def mutate(pairs: Pairs, draw: Random) -> Mutated:
        at = draw.randrange(len(pairs))
        key, value = pairs[at]
        new = make(value, draw)
        return f"{key}={json.dumps(new)[:60]}", [*pairs[:at], (key, new), *pairs[at + 1 :]], (key,)

    return mutate


def swapped(pairs: Pairs, draw: Random) -> Mutated:
    (one, a), (two, b) = draw.sample(pairs, 2)
    return f"{one}, {two}", [(k, b if k == one else a if k == two else v) for k, v in pairs], (one, two)


def added(pairs: Pairs, draw: Random) -> Mutated:
    """Adds a key that the file lacks, of its method or of another, with a strange value."""
    method, others = str(dict(pairs)["model_name"]), models.available()
    known = sorted({k for m in draw.choice([[method], others]) for k in models.settings_of(m).model_fields})
    key, value = draw.choice([k for k in known if k not in dict(pairs)]), draw.choice(draw.choice(GROUPS))
    return f"{key}={json.dumps(value)[:60]}", [*pairs, (key, value)], (key,)


def swept(pairs: Pairs, draw: Random) -> Mutated:
    """A malformed sweep, one over unknown keys, one with the same run twice, or one with too many cells."""
    rest, sweep = {k: v for k, v in pairs if k != "sweep"}, dict(pairs).get("sweep")
    keys, strange = draw.sample(sorted(rest), 3), draw.choice(draw.choice(GROUPS))
    wrong = misspelt(keys[0], draw)
    grid = {key: [extreme(rest[key], draw) for _ in range(draw.randint(0, 3))] for key in keys[: draw.randint(1, 3)]}
    many = {"init_lr": [0.001 * k for k in range(1, 200)], "batch_size": list(range(1, 200))}
    ways: list[Any] = [
        strange, grid, [grid, strange], {keys[0]: strange}, [{key: extreme(rest[key], draw)} for key in keys], many,
        {wrong: [1]}, {"seed": [1, 2]}, {"sweep": [1]}, [{"sweep": {}}, {"seed": 1}], [{}, {}],
        {key: list(range(50)) for key in keys}, [{"prefix": str(k)} for k in range(100_000)], {**many, "seed_": [1]},
        {"batch_size": list(range(1, 60))}, [{"model_name": m} for m in ("joint", "nothing")],
    ]  # fmt: skip
    if sweep is not None:
        ways += [[sweep, sweep], str(sweep), [sweep] * 200, list(sweep)]
        ways += [{k: v + v for k, v in sweep.items()} if isinstance(sweep, dict) else sweep + sweep] * 3
    new = draw.choice(ways)
    return (
        json.dumps(new)[:70],
        [*rest.items(), ("sweep", new)],
        ("sweep", wrong, *rest, *(sweep if isinstance(sweep, dict) else ())),
    )


def hostile(pairs: Pairs, draw: Random) -> Mutated:
    """A text that attacks whoever shows it, in a free text, a name or a path."""
    key = draw.choice(["prefix", "about", "dataset", "model_name", "backbone_type", "data_path", "data_root"])
    text = draw.choice(HOSTILE)
    return f"{key}={json.dumps(text)}", [*((k, v) for k, v in pairs if k != key), (key, text)], (key,)


def deep(pairs: Pairs, draw: Random) -> Mutated:
    """Lists or objects within each other, as deep as a parser may still read and a search for faults may not."""
    levels, (opening, closing) = (
        draw.choice([20, 100, 700, 990, 2_000, 100_000]),
        draw.choice([("[", "]"), ('{"a":', "}")]),
    )
    (key, _), text = draw.choice(pairs), opening * levels + "1" + closing * levels
    rest = json.dumps({k: v for k, v in pairs if k != key})
    return f"{key} {levels} levels deep", f'{rest[:-1]}, "{key}": {text}}}', ("nested too deep", key)


def cut(pairs: Pairs, draw: Random) -> Mutated:
    text = json.dumps(dict(pairs), indent=2)
    at = draw.randrange(len(text))
    return f"cut at {at}", text[:at], ()


def broken(pairs: Pairs, draw: Random) -> Mutated:
    """What people and editors do to JSON."""
    text = json.dumps(dict(pairs), indent=2)
    at, comma = draw.choice([m.start() for m in re.finditer(r"[,{}:\"]", text)]), text.index(",") + 1
    ways = {
        "trailing comma": f"{text[:-1].rstrip()},\n}}", "stray comma": f"{text[:at]},{text[at:]}", "no braces": text[1:-1],
        "single quotes": text.replace('"', "'"), "comment": f"{text[:comma]} // why\n{text[comma:]}", "spaces": " \n\t",
        "block comment": f"/* mine */ {text}", "hash comment": f"# mine\n{text}", "two objects": text + text,
        "list around": f"[{text}]", "merge conflict": f"<<<<<<< HEAD\n{text}\n=======\n{text}\n>>>>>>> x",
        "python": repr(dict(pairs)), "a sign lost": text[:at] + text[at + 1 :], "html": f"<html>{text}</html>",
        "a sign doubled": text[: at + 1] + text[at:], "deep": '{"a":' * 50_000, "curly quotes": text.replace('"', "“"),
        "long number": text.replace(": ", ": " + "7" * 6_000, 1), "yaml": "\n".join(f"{k}: {v}" for k, v in pairs),
        "tab in text": text.replace('": "', '": "\t', 1), "escape": text.replace('": "', '": "\\q', 1),
    }  # fmt: skip
    what = draw.choice(sorted(ways))
    # some are still JSON, but no object, too deep, or (a comma may stand within a text) another name or value
    return what, ways[what], ("an object", "is not usable JSON", "twice", "unknown key", *(key for key, _ in pairs))


def encoded(pairs: Pairs, draw: Random) -> Mutated:
    text = json.dumps({**dict(pairs), "about": "größer, für Ä"}, indent=2, ensure_ascii=False)
    plain = text.encode()
    at = draw.randrange(len(plain))
    flipped = plain[:at] + bytes([plain[at] ^ 1 << draw.randrange(8)]) + plain[at + 1 :]
    coded = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp037", "utf-8-sig", "utf-7")
    ways = {name: text.encode(name) for name in coded} | {"gzip": b"\x1f\x8b\x08" + plain, "a bit": flipped}
    ways |= {f"byte {byte:02x}": plain[:at] + bytes([byte]) + plain[at:] for byte in (0, 0xFF)}
    what = draw.choice(sorted(ways))
    return (
        f"{what} at {at}",
        ways[what],
        ("twice", "unknown key", *(key for key, _ in pairs)) if what == "a bit" else (),
    )


MUTATIONS: dict[str, Mutation] = {
    "key missing": missing, "key doubled": doubled, "key misspelt": renamed, "key added": added,
    "wrong type": replaced(foreign), "extreme value": replaced(extreme), "values swapped": swapped, "sweep": swept,
    "hostile text": hostile, "deep": deep, "cut off": cut, "broken JSON": broken, "encoding": encoded,
}  # fmt: skip


def mutants(path: Path, count: int, seed: int = 0) -> Iterator[Mutant]:
    """`count` mutants of one file, every kind in turn; the same ones for the same seed."""
    draw = Random(named_seed("fuzz", seed, path.stem))
    pairs = list(json.loads(path.read_text(encoding="utf-8")).items())
    kinds = draw.sample(list(MUTATIONS), len(MUTATIONS))
    for number in range(count):
        kind = kinds[number % len(kinds)]
        what, new, keys = MUTATIONS[kind](pairs, draw)
        names = tuple(map(pattern, keys)) + (() if isinstance(new, list) else (PLACE,))
        if isinstance(new, list):
            new = "{" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in new) + "}"
        yield Mutant(kind, f"{path.stem}: {what}", new.encode() if isinstance(new, str) else new, names)


def pattern(key: str) -> str:
    """Finds a key in a message, as a whole word; of a very long or unprintable one its start, of an empty one its quotes."""
    if not key:
        return '""'
    start = re.match(r"[ -~]{,30}", key)[0]  # type: ignore[index]  # it always matches
    return rf"(?<!\w){re.escape(start)}" + (r"(?!\w)" if start == key else "")


# The check -------------------------------------------------------------------------------------------------------------


def judge(mutant: Mutant, folder: Path) -> tuple[str, float]:
    """Runs `--check` on the mutant in an empty folder: (`accepted`, `refused` or what is wrong with the answer, seconds)."""
    path = folder / "mutant.json"
    path.write_bytes(mutant.content)
    # strict UTF-8, as a terminal: text that cannot be printed must not get that far
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    arguments = ["--config", path, "--check", "--out", folder / "out", "--data-root", folder / "data"]
    started = time.process_time()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), guarded():
            code = program.main([*map(str, arguments)])
    except (Exception, SystemExit) as error:  # an exception that main.main lets through is a fault of the program
        return f"{type(error).__name__}: {error}"[:300], time.process_time() - started
    seconds = time.process_time() - started
    for stream in (out, err):
        stream.flush()
    shown, said = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
    message, verdict = said.removeprefix(f"error: {path}"), "refused" if code == 2 else "accepted"
    if [*folder.iterdir()] != [path]:
        verdict = "it wrote files"
    elif seconds > LIMIT:
        verdict = f"it took {seconds:.1f} s"
    elif CONTROL.search(shown + said) or SHOWN.search(shown + said) or "Traceback" in said or len(said) > LONGEST:
        verdict = f"not readable: {len(said)} characters, {said[:300]!r}"
    elif code not in (0, 2) or (code == 2 and message == said):
        verdict = f"exit code {code}: {said[:300]}"
    elif code == 2 and not any(re.search(name, message) for name in mutant.names):
        verdict = f"the message does not name {' or '.join(mutant.names)}: {said[:400]}"
    return verdict, seconds


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Ends what takes six times the time allowed or more memory than `ROOM`, instead of the machine."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"over {6 * LIMIT:g} s")

    limits, before = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    if (sizes := Path("/proc/self/statm")).exists():  # the pages in use now come first; Linux alone says
        used = int(sizes.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, 6 * LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def main(argv: list[str] | None = None) -> int:
    ask = argparse.ArgumentParser(prog="benchmarks.fuzz", description=__doc__)
    ask.add_argument("--mutants", type=int, default=3000, help="in all, shared by the files (default: 3000)")
    ask.add_argument("--seed", type=int, default=0)
    args = ask.parse_args(argv)
    # before the work, during which the files may change
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=FILES[0].parent
    )
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in MUTATIONS}
    times: list[tuple[float, str]] = []
    faults: list[str] = []
    for number, file in enumerate(FILES):
        for mutant in mutants(file, (args.mutants + number) // len(FILES), args.seed):
            with tempfile.TemporaryDirectory() as folder:
                outcome, seconds = judge(mutant, Path(folder))
            times.append((seconds, f"{mutant.kind}, {mutant.what}"))
            counts[mutant.kind][outcome if outcome in ("accepted", "refused") else "fault"] += 1
            if outcome not in ("accepted", "refused"):
                faults.append(printable(f"- {mutant.kind}, {mutant.what}: {outcome}"))
                print(faults[-1], file=sys.stderr)
    print(f"# Mutated experiment files\n\n`python -m benchmarks.fuzz --mutants {args.mutants} --seed {args.seed}`, commit "
          f"{asked.stdout.strip()}: {len(times)} mutants of {len(FILES)} files through `main.py --check`.\n")  # fmt: skip
    print("| mutation | accepted | refused by name (exit 2) | faults of the program |\n|---|---|---|---|")
    for kind, count in [*counts.items(), ("**all**", sum(counts.values(), Counter()))]:
        print(f"| {kind} | {count['accepted']} | {count['refused']} | {count['fault']} |")
    mean, slowest = sum(seconds for seconds, _ in times) / len(times), sorted(times, reverse=True)[:3]
    print(f"\nProcessor time: mean {mean:.2f} s. The slowest, the first of which imports torch:\n")
    print("\n".join([*(printable(f"- {seconds:.1f} s: {what}") for seconds, what in slowest), *faults]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
