"""Makes icons.npz and icons-licences.md again: `python -m utils.data.shipped.make_icons iconify-json-2.2.535.tgz`.

The argument is the npm package of that name (`npm pack @iconify/json@2.2.535`, 104 MB): one JSON file an icon set, and
collections.json with each set's author and licence. Needs `pip install resvg-py==0.5.0`, which draws the SVG code.

A class is a concept, an image the icon that one set of icons draws for it: the icon of that name without words of style
(outline, filled, 24, ...), of several the shortest name. Only sets whose licence permits to pass them on with a notice.
Each icon is drawn in black on white at 192 px in a border of 16 px, and reduced to 112 and then 32 px by Lanczos' filter.
"""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
CLASSES = """
    anchor apple barcode battery bell bluetooth book bookmark box briefcase brush bug building bus calculator calendar
    camera car clipboard clock cloud coffee compass copy credit-card crown cube database diamond eraser eye film
    fingerprint fire flag folder gift glasses globe headphones headset heart home hospital hourglass image key keyboard
    laptop leaf lightbulb link lock magnet mail map megaphone microphone moon mouse music palette paperclip pencil phone
    play plug printer radio rocket ruler scissors server shield shopping-bag shopping-cart skull snowflake speaker star
    stopwatch sun tablet tag target thermometer ticket train trash tree trophy truck tv umbrella usb user wallet watch
    wifi wrench
""".split()  # noqa: SIM905
# words of style, beside numbers, in the names of icons
STYLES = """
    outline outlined filled fill bold thin light duotone solid line linear regular sharp rounded round twotone broken bulk color
    flat two tone alt o circle square large md
""".split()  # noqa: SIM905
LICENCES = ("MIT", "Apache-2.0", "ISC", "BSD-3-Clause", "CC0-1.0", "Unlicense")
NOT_CONCEPTS = ("Programming", "Logos", "Emoji", "Flags / Maps", None)  # categories of sets; withdrawn sets have none
HEAD = """# The icons in icons.npz

{images:,} icons of {sets} sets, reduced to grey images of 32 x 32 pixels, from the npm package `@iconify/json` {version}.
Each icon belongs to the author of its set, who permits its use under the licence named here; the page of each licence
has its full text and copyright line. MIT, ISC, BSD-3-Clause and Apache-2.0 ask that this notice stays with the images.

| set | name | author | licence | text | icons |
|---|---|---|---|---|---|"""
DRAWN, BORDER, BETWEEN, SIDE = 192, 16, 112, 32  # pixels


def concept(name: str) -> str:
    """The name of an icon without words of style: "camera-outline-24" is "camera"."""
    return "-".join(word for word in name.split("-") if word not in STYLES and not word.isdigit())


def chosen(icons: dict[str, Any]) -> dict[str, str]:
    """{class: name of the icon} for the classes that a set draws."""
    names: dict[str, str] = {}
    for name in sorted(icons, key=lambda name: (len(name), name)):
        names.setdefault(concept(name), name)
    return {name: names[name] for name in CLASSES if name in names}


def drawn(icon: dict[str, Any], defaults: dict[str, Any]) -> np.ndarray:
    """Grey values uint8 [32, 32] of an icon, black on white. What a set does not say of an icon, its `defaults` say."""
    import resvg_py

    box = {"left": 0, "top": 0, "width": 16, "height": 16}
    left, top, width, height = (icon.get(key, defaults.get(key, value)) for key, value in box.items())
    body = icon["body"].replace("currentColor", "#000")
    body = re.sub(r"<(animate\w*|set)\b[^>]*?(/>|>.*?</\1>)", "", body, flags=re.DOTALL)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{DRAWN}" height="{DRAWN}">{body}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=DRAWN, height=DRAWN, background="white")
    canvas = Image.new("L", (DRAWN + 2 * BORDER, DRAWN + 2 * BORDER), 255)
    canvas.paste(Image.open(io.BytesIO(bytes(png))).convert("L"), (BORDER, BORDER))
    lanczos = Image.Resampling.LANCZOS
    return np.asarray(canvas.resize((BETWEEN, BETWEEN), lanczos).resize((SIDE, SIDE), lanczos))


def make(package: Path, to: Path = HERE) -> None:
    """Writes icons.npz and icons-licences.md to `to`, from the npm package as a .tgz."""
    with tarfile.open(package) as archive:

        def read(name: str) -> Any:
            file = archive.extractfile(f"package/{name}")
            assert file is not None
            return json.load(file)

        known, version = read("collections.json"), read("package.json")["version"]
        images, labels, sets, notices = [], [], [], []
        for name, about in sorted(known.items()):
            licence = about["license"].get("spdx")
            if licence not in LICENCES or about.get("category") in NOT_CONCEPTS:
                continue
            content = read(f"json/{name}.json")
            names = chosen(content["icons"])
            for label, icon in ((CLASSES.index(c), icon) for c, icon in names.items()):
                images.append(drawn(content["icons"][icon], content))
                labels.append(label)
                sets.append(name)
            if names:
                author, url = about["author"]["name"], about["license"].get("url", about["author"].get("url", ""))
                notices.append(f"| {name} | {about['name']} | {author} | {licence} | {url} | {len(names)} |")
    order = np.argsort(labels, kind="stable")
    np.savez_compressed(
        to / "icons.npz",
        classes=np.array(CLASSES),
        images=np.stack(images)[order],
        labels=np.array(labels, np.int64)[order],
        sets=np.array(sets)[order],
    )
    head = HEAD.format(version=version, images=len(images), sets=len(notices))
    (to / "icons-licences.md").write_text("\n".join([head, *notices]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
