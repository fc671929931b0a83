"""How names of files and classes are shown: those that are not UTF-8, and those that look alike and differ."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence

SHOWN = 10  # names in a sentence


def readable(name: str) -> str:
    """A file name as text that can be written anywhere: bytes that are not UTF-8 become `\\xe9`, other names stay."""
    return os.fsencode(name).decode("utf-8", "backslashreplace") if not name.isascii() else name


def listed(names: Iterable[str], most: int = SHOWN) -> str:
    """The first names, readable, and how many more there are."""
    names = list(names)
    return ", ".join(map(readable, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def same_but_for_form(one: Sequence[str], other: Sequence[str]) -> str:
    """A clause for names that are equal once composed (Unicode NFC) and differ as they are; empty if there are none.

    An accented letter is one character in names that Linux and Windows write, a letter and a mark in those of older Macs."""
    composed = {unicodedata.normalize("NFC", name): name for name in other}
    for name in one:
        twin = composed.get(unicodedata.normalize("NFC", name))
        if twin is not None and twin != name:
            return (
                f"; {name!a} and {twin!a} look alike and differ in their Unicode form: rename one, as "
                "`convmv --nfc -f utf8 -t utf8` does"
            )
    return ""
