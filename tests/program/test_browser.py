"""report.html and compare.html in a real browser: no errors, nothing wider than the screen, light and dark, desk and phone.

Chromium's window is never narrower than 500 pixels, so each page stands in three frames beside each other, as wide as the
screens of a desk, a tablet and a phone; a frame of `srcdoc` may be measured from outside.
"""

import json
import re
import shutil
import subprocess
from html import escape, unescape

import numpy as np
import pytest
from PIL import Image

import main
from tests.helpers.runs import tiny_experiment
from utils.report import page

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
if BROWSER is None or BROWSER.startswith("/snap/"):  # which sees no temporary folder
    pytest.skip("no Chromium on PATH that reads any folder (Debian: apt-get install chromium)", allow_module_level=True)

WIDTHS, HEIGHT = (1600, 800, 400), 1600  # pixels
PAPER = {False: (255, 255, 255), True: (0x14, 0x17, 0x1B)}  # of the page, light and dark
MEASURE = """
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const inner = frame.contentDocument, root = inner.documentElement;
    const closed = root.scrollWidth;
    inner.querySelectorAll("details").forEach(one => one.open = true);
    const wide = [...inner.querySelectorAll("body > *")].filter(e => e.getBoundingClientRect().right > root.clientWidth + 1);
    const sizes = [root.clientWidth, closed, root.scrollWidth, inner.querySelectorAll("svg").length, inner.images.length];
    const drawn = [...inner.querySelectorAll("figure svg")];
    const cut = drawn.filter(e => e.getBoundingClientRect().right > root.clientWidth).length;
    const main = inner.querySelector(".cards");
    const inside = !main || main.parentElement.scrollWidth <= main.parentElement.clientWidth;
    const broken = [...inner.images].filter(image => !image.naturalWidth).length;
    inner.querySelectorAll("details").forEach(one => one.open = false);
    return [...sizes, broken, cut, inside, wide.map(e => e.tagName + " " + e.textContent.slice(0, 60))];
  });
  const told = document.createElement("pre");
  told.id = "told";
  told.textContent = JSON.stringify([matchMedia("(prefers-color-scheme: dark)").matches, found]);
  document.body.append(told);
});
"""


def look(html, place, dark, height=HEIGHT):
    """(whether dark was asked for, measures of each frame, the console's lines, picture [height, sum of WIDTHS, 3])."""
    frame = '<iframe srcdoc="{}" style="width:{}px;height:{}px;border:0;display:block"></iframe>'
    frames = "".join(frame.format(escape(html), width, height) for width in WIDTHS)
    wrapper = (
        '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f'<body style="margin:0"><div style="display:flex">{frames}</div><script>{MEASURE}</script></body>'
    )
    (place / "wrapper.html").write_text(wrapper, encoding="utf-8")
    picture = place / f"{'dark' if dark else 'light'}.png"
    line = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    line += [
        f"--user-data-dir={place / 'profile'}",
        f"--window-size={sum(WIDTHS)},{height}",
        "--virtual-time-budget=5000",
    ]
    line += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--screenshot={picture}", "--dump-dom"]
    done = subprocess.run(
        [*line, (place / "wrapper.html").as_uri()], capture_output=True, encoding="utf-8", errors="replace", timeout=60
    )
    told = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert told, done.stderr[-2000:]
    is_dark, frames = json.loads(unescape(told[1]))
    console = [text for text in done.stderr.splitlines() if ":CONSOLE" in text]
    return is_dark, frames, console, np.asarray(Image.open(picture).convert("RGB"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The two pages of tiny runs of two methods, by name."""
    place = tmp_path_factory.mktemp("runs")
    write, out = page.write_report, str(place / "logs")
    with pytest.MonkeyPatch.context() as patch:
        for method, seed in (("sema", 3), ("sema", 4), ("simplecil", 3)):
            run = tiny_experiment(
                method, place, patch, seed=[seed], prefix="x" * 120, about="A long line of words " * 20
            )
            if (method, seed) == ("sema", 3):
                patch.setattr(page, "write_report", write)
            assert main.main([*run, "--out", out]) == 0
    assert main.main(["--compare", str(place / "logs" / "sema"), str(place / "logs" / "simplecil"), "--out", out]) == 0
    (report,) = (place / "logs" / "sema").glob("*/seed_3/report.html")
    return {path.name: path.read_text(encoding="utf-8") for path in (report, place / "logs" / "compare.html")}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["report.html", "compare.html"])
def test_page_in_a_browser(name, dark, pages, tmp_path):
    is_dark, frames, console, picture = look(pages[name], tmp_path, dark)
    assert is_dark == dark and console == []
    for width, (inner, closed, opened, pictures, images, broken, cut, inside, wide) in zip(WIDTHS, frames, strict=True):
        assert inner == width and closed <= width and opened <= width and wide == []
        assert pictures == pages[name].count("<svg") >= 3 and cut == 0  # no chart is cut
        assert inside  # the main table of a comparison needs no scrolling
        assert images == pages[name].count("<img") and broken == 0 and (images > 2) == (name == "report.html")
    for part in np.split(picture, np.cumsum(WIDTHS)[:-1], axis=1):
        colours, counts = np.unique(part.reshape(-1, 3), axis=0, return_counts=True)
        assert tuple(colours[counts.argmax()]) == PAPER[dark]
        assert len(colours) > 30 and 0.03 < 1 - counts.max() / counts.sum() < 0.9  # neither blank nor covered


def test_what_is_too_wide_or_fails_is_noticed(tmp_path):
    """The measures themselves: a page of which everything is wrong."""
    html = (
        '<!doctype html><div style="width:2000px">wide</div><img src="data:image/png;base64,x"><script>gone()</script>'
    )
    _, frames, console, _ = look(html, tmp_path, dark=False)
    assert [frame[2] for frame in frames] == [2000 + 8] * 3
    assert all(frame[5] == 1 and frame[8] for frame in frames)
    assert console and "gone is not defined" in console[0]
