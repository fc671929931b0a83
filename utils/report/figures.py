"""Figures as files for papers: SVG whose letters are outlines and PDF with its fonts embedded, both vectors."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from utils.files.storage import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# a PDF with TrueType fonts (42) is what publishers take; equal figures give equal files
OPTIONS = {"pdf.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "figures"}
DATES = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


def write(folder: Path, pictures: Mapping[str, Figure]) -> None:
    """Writes NAME.svg and NAME.pdf of each picture into `folder`."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        for ending, dates in DATES.items():
            buffer = io.BytesIO()
            with matplotlib.rc_context(OPTIONS), warnings.catch_warnings():  # type: ignore[arg-type]
                warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box stands there
                figure.savefig(buffer, format=ending, dpi=300, facecolor="white", metadata=dates)
            write_bytes(folder / f"{name}.{ending}", buffer.getvalue())
