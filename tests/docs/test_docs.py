"""The documentation says what is there: links and anchors resolve, commands are valid, snippets run, the README stays short.

A fenced block without a language holds commands, one a line; `python` blocks of docs/python.md and of the README are
run, `json` blocks are experiments or sweeps, `text` blocks are output or patterns. What a command needs beyond this
repository is a comment at its end ("# needs a GPU").
"""

import argparse
import importlib.util
import itertools
import json
import os
import re
import shlex
from pathlib import Path

import pytest

import main
import models
from commands import options
from commands.load import load
from utils.compare import summary
from utils.report import page as report_page

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (
    ROOT / "docs" / "writing-a-method.md"
)  # its blocks belong to a method that is not there; a test beside it runs them
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "benchmarks").glob("*.md"))
PAGES += [page for page in [ROOT / "tests" / "README.md"] if page.is_file()]
TOOLS = {"cat", "ruff", "mypy", ".", "python3"}  # commands that are not ours
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order; their indentation is removed."""
    return [
        "\n".join(line.removeprefix(indent) for line in body.splitlines())
        for indent, named, body in FENCE.findall(text_of(page))
        if named == language
    ]


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, spaces to hyphens, other signs but hyphens and underscores dropped."""
    slugs: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text_of(page)), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        slugs[slug] = slugs.get(slug, 0) + 1
    return {slug if not n else f"{slug}-{n}" for slug, count in slugs.items() for n in range(count)}


def links(page: Path) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text_of(page)))
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)} links to {link}: no such file"
        assert target.is_relative_to(ROOT), f"{name_of(page)} links to {link}, outside the repository"
        if anchor:
            assert anchor in anchors(target), f"{name_of(page)} links to {link}: {sorted(anchors(target))}"


def test_every_page_is_reached_from_the_readme():
    reached, new = set(), {ROOT / "README.md"}
    while new:
        page = new.pop()
        reached.add(page)
        targets = {(page.parent / link.partition("#")[0]).resolve() for link in links(page) if "://" not in link}
        new |= {t for t in targets if t.suffix == ".md" and t.is_file()} - reached
    assert not (set(PAGES) - reached), "not linked from the README, nor from a page it links to"


def test_the_readme_can_be_read_in_one_sitting():
    text = text_of(ROOT / "README.md")
    assert len(text.splitlines()) <= 150 and len(text.encode()) <= 12 * 1024


# ---------------------------------------------------------------------------------------------- commands


def commands_of(page: Path) -> list[str]:
    """Command lines without their comments; lines joined by && are separate."""
    lines = [line for block in blocks(page, "") for line in block.splitlines() if line.strip()]
    bare = [re.sub(r"\s+# .*$", "", line) for line in lines]
    return [command.strip() for line in bare if not line.startswith("#") for command in line.split(" && ")]


def parsed(words: list[str]) -> argparse.Namespace:
    return options.parse(words, about="")


def check_main(words: list[str], known_config: bool = True) -> None:
    """Arguments of main.py: its parser takes them, and the experiment resolves without a fault."""
    args = parsed(words)
    if args.config is not None and args.config.parts[0] == "logs":  # a file that the command above it writes
        return
    if args.config is not None and known_config:
        assert (ROOT / args.config).is_file(), f"no such experiment: {args.config}"
        args.config = ROOT / args.config
        load(args)


def check_module(words: list[str]) -> None:
    """`python -m MODULE ...` of this repository: the module is there, and it or a module beside it knows the options."""
    spec = importlib.util.find_spec(words[0])
    assert spec is not None and spec.origin is not None, f"no such module: {words[0]}"
    source = "".join(text_of(file) for file in Path(spec.origin).parent.glob("*.py"))
    for word in words[1:]:
        assert not word.startswith("--") or f'"{word}"' in source, f"{words[0]} has no option {word}"


def check_command(command: str, page: Path) -> None:
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if words[0] == "torchrun":
        check_main(words[words.index("main.py") + 1 :])
    elif words[:2] == ["python", "main.py"]:
        check_main(words[2:], known_config=page != GUIDE)
    elif words[0] == "pytest" or words[:3] == ["python", "-m", "pytest"]:
        tests = [word for word in words if word.startswith("tests")]
        assert page == GUIDE or all((ROOT / word.partition("::")[0]).exists() for word in tests), (
            f"no such tests: {tests}"
        )
    elif words[:2] == ["python", "-m"]:
        check_module(words[2:])
    elif words[:2] == ["pip", "install"]:
        files = [word for flag, word in itertools.pairwise(words) if flag == "-r"]
        assert files and all((ROOT / file).is_file() for file in files)
    else:
        assert words[0] in TOOLS or os.access(ROOT / words[0], os.X_OK), f"unknown command: {command}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_valid(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in commands_of(page):
        try:
            check_command(command, page)
        except (AssertionError, ValueError, SystemExit) as error:
            pytest.fail(f"{name_of(page)}: {command}\n{error}")


OURS = ("backbone/", "benchmarks/", "commands/", "docs/", "exps/", "models/", "tests/", "utils/")


def inline_code(page: Path) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCE.sub("", text_of(page)))]


@pytest.mark.parametrize("page", [page for page in PAGES if page != GUIDE], ids=name_of)
def test_names_in_the_text_exist(page, monkeypatch):
    """Paths, commands and keys that the text mentions in backticks; capitals, <...>, *, {...} stand for the reader's."""
    monkeypatch.chdir(ROOT)
    keys = {"sweep"} | {key for method in models.available() for key in models.settings_of(method).model_fields}
    for code in inline_code(page):
        if code.startswith(OURS) and " " not in code:
            found = list(ROOT.glob(code)) if re.search(r"[*]", code) else [ROOT / code]
            assert re.search(r"[<{]|mine", code) or any(path.exists() for path in found), f"no such path: {code}"
        elif code.startswith(("python ", "torchrun ")) and not re.search(r"[A-Z]{3}|\[", code):
            check_command(code, page)
        elif key := re.fullmatch(r'"?([a-z]\w*_\w+)"?: .+', code):
            assert key[1] in keys, f"no such key: {code}"


def test_ci_and_the_readme_have_the_same_command():
    command = "pip install -r requirements.txt -r requirements-dev.txt && python -m pytest"
    assert command in text_of(ROOT / "README.md").splitlines() and command in text_of(ROOT / ".ci" / "run")


@pytest.mark.parametrize("page", [page for page in PAGES if page != GUIDE and blocks(page, "json")], ids=name_of)
def test_json_blocks_are_experiments_or_sweeps(page, tmp_path):
    for block in blocks(page, "json"):
        texts = block.splitlines() if "\n{" in block else [block]
        for values in map(json.loads, texts):
            if "model_name" not in values:  # a change to an experiment
                values = json.loads(text_of(ROOT / "exps" / "sema_digits_short.json")) | values
            path = tmp_path / "experiment.json"
            path.write_text(json.dumps(values), encoding="utf-8")
            load(parsed(["--config", str(path)]))


# ---------------------------------------------------------------------------------------------- what is run


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working directory that has the experiments, as the repository has them."""
    (tmp_path / "exps").symlink_to(ROOT / "exps", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_page_the_readmes_prediction_and_the_commands_on_runs(workplace, capsys, monkeypatch):
    """One run of a second, started by docs/python.md; everything that is said of finished runs is done with it."""
    monkeypatch.setattr(report_page, "write_report", lambda *args, **options: None)  # most of a small run's time
    names: dict = {"__name__": "docs"}
    for block in blocks(ROOT / "docs" / "python.md", "python"):
        exec(compile(block, "docs/python.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "models.simplecil after task 5 of 5" in printed and "accuracy on task 1: 0.9" in printed
    assert names["scores"].shape == (len(names["labels"]), 10) and names["results"]["last_accuracy"] > 97

    block = next(block for block in blocks(ROOT / "docs" / "runs.md", "") if "--explain" in block)
    lines = block.replace("logs/quickstart", "logs/simplecil_digits").splitlines()
    assert len(lines) == 6
    for line in lines:
        assert main.main(shlex.split(line)[2:]) == 0, line
    printed = capsys.readouterr().out
    assert "PASS" in printed and "every number is as recorded" in printed and Path("logs/compare.html").is_file()

    (block,) = blocks(ROOT / "README.md", "python")
    exec(compile(block, "README.md", "exec"), names)
    assert names["scores"].shape == (4, 10)


def test_the_readme_shows_what_the_quick_start_prints():
    """Its rows are those of the file, its columns and lines those of this version, its numbers those that the file expects."""
    shown = next(block for block in blocks(ROOT / "README.md", "text") if block.startswith("fashion, ")).splitlines()
    values = json.loads(text_of(ROOT / "exps" / "quickstart.json"))
    labels = [arm["prefix"] for arm in values["sweep"]]
    assert shown[0] == "fashion, 3 tasks of 2+4+4 classes, seed 1993 (percent, * the best)"
    assert shown[1].split() == [column.title.removesuffix(" (s)") for column in summary.COLUMNS]
    for label, line in zip(labels, shown[2:], strict=False):
        last = re.fullmatch(rf"{label} +(\d+\.\d\d)\*? .*", line)
        assert last and f" {float(last[1]):.1f} ({label})" in values["about"]
    assert shown[2 + len(labels)] == "" and shown[3 + len(labels)].startswith("The highest last accuracy is ")
    swept = load(parsed(["--config", str(ROOT / "exps" / "quickstart.json")]))
    assert shown[-2:] == [f"{what}: logs/quickstart/sweep_{swept.hash}{end}" for what, end in LAST_LINES]


LAST_LINES = (("page", "/report.html"), ("table (txt, csv, md, tex)", ""))
