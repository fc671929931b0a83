"""The table of all keys of an experiment file, made from the methods' Settings: `python -m commands.keys` puts it into
README.md.

Without `--check` the part of the README between the two markers is replaced; with it, the exit code is 1 if it is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import models
from utils.config.schema import Experiment, Trained

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- keys: made by python -m commands.keys -->", "<!-- end of keys -->"


def table() -> str:
    """A Markdown row a key: name, default, meaning with unit and source, and the methods that have it."""
    methods = models.available()
    rows: dict[str, dict[str, FieldInfo]] = {}
    for method in methods:
        for key, field in models.settings_of(method).model_fields.items():
            rows.setdefault(key, {})[method] = field
    lines = ["| key | default | meaning | methods |", "|---|---|---|---|"]
    order = [*Experiment.model_fields, *(k for k in Trained.model_fields if k not in Experiment.model_fields)]
    for key in [*order, *sorted(rows.keys() - set(order))]:
        lines.append(
            "| " + " | ".join([f"`{key}`", _defaults(rows[key]), _meaning(rows[key]), _who(rows[key], methods)]) + " |"
        )
    return "\n".join(lines)


def _defaults(fields: dict[str, FieldInfo]) -> str:
    """The default of most methods, then those of the others."""
    found: dict[str, list[str]] = {}
    for method, field in fields.items():
        found.setdefault(
            _text(field.get_default(call_default_factory=True) if not field.is_required() else ...), []
        ).append(method)
    most, *others = sorted(found.items(), key=lambda item: -len(item[1]))
    return "; ".join([most[0], *(f"{', '.join(who)}: {value}" for value, who in others)])


def _text(value: Any) -> str:
    if value is ... or value is PydanticUndefined:
        return "required"
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)}`"


def _meaning(fields: dict[str, FieldInfo]) -> str:
    """The description, or where methods mean different things each one's."""
    found: dict[str, list[str]] = {}
    for method, field in fields.items():
        found.setdefault(field.description or "", []).append(method)
    if len(found) == 1:
        text = next(iter(found))
    else:
        text = "; ".join(
            f"{', '.join(who)}: {meaning}" for meaning, who in sorted(found.items(), key=lambda i: -len(i[1]))
        )
    return text.replace("|", "\\|")


def _who(fields: dict[str, FieldInfo], methods: list[str]) -> str:
    """`all`, or the methods; where most have it, those that do not."""
    lack = [method for method in methods if method not in fields]
    if not lack:
        return "all"
    return f"all but {', '.join(lack)}" if len(lack) <= 2 and len(methods) > 5 else ", ".join(fields)


def replaced(readme: str) -> str:
    """The README's text with the table as it is now. Raises ValueError if a marker is missing."""
    head, found, rest = readme.partition(BEGIN)
    _, ended, tail = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"README.md lacks the line {BEGIN if not found else END}")
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the table is out of date")
    args = ask.parse_args()
    before = README.read_text(encoding="utf-8")
    after = replaced(before)
    if args.check:
        return int(before != after)
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
