"""docs/keys.md shows every key of every method once in the table where a reader looks for it."""

import re

import pytest

import models
from commands import keys

TEXT = keys.page()


def section(title: str) -> str:
    """The text below a heading, up to the next one of its level."""
    return re.split(r"\n## ", TEXT.partition(f"\n## {title}\n")[2], maxsplit=1)[0]


def rows(text: str) -> list[str]:
    return re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)


def test_the_page_is_up_to_date():
    assert keys.PAGE.read_text(encoding="utf-8") == TEXT, "run python -m commands.keys"


def test_check_writes_nothing_and_its_exit_code_says_whether_the_page_is_out_of_date(tmp_path, monkeypatch):
    page = tmp_path / "docs" / "keys.md"
    monkeypatch.setattr(keys, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["keys", "--check"])
    assert keys.main() == 1 and not page.exists()
    monkeypatch.setattr("sys.argv", ["keys"])
    assert keys.main() == 0 and page.read_text(encoding="utf-8") == TEXT
    monkeypatch.setattr("sys.argv", ["keys", "--check"])
    assert keys.main() == 0


@pytest.mark.parametrize("name", models.available())
def test_a_reader_reaches_every_key_of_a_method(name):
    """A key stands in the method's section, in a table it links to, or among those of every method."""
    text = section(f"`{name}`")
    assert models.summaries()[name].split(":")[0] in text.replace("\n", " ")
    linked = re.findall(r"\[([^\]`]+)\]\(#", text.replace("\n", " "))
    common = ["Keys of every method", "Keys of every method that trains", "Cluster and speed", *linked]
    reached = set(rows(text)).union(*(rows(section(title)) for title in common))
    assert models.settings_of(name).model_fields.keys() <= reached


def test_no_table_is_long_and_no_key_is_in_it_twice():
    for table in re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE):
        names = rows(table)
        assert len(names) == len(set(names)) <= 25


def test_every_link_leads_to_a_heading():
    anchors = {keys._link(title).partition("#")[2].rstrip(")") for title in re.findall(r"^## (.*)", TEXT, re.MULTILINE)}
    assert set(re.findall(r"\(#([^)]*)\)", TEXT)) == anchors
