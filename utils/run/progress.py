"""Progress bars: redrawn in place on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

from utils.text import clock, printable

SOON = 2.0  # seconds of work that need no bar


def write_line(text: str, stream: TextIO) -> None:
    """Writes `text` without disturbing a progress bar on the same terminal."""
    text, encoding = printable(text), getattr(stream, "encoding", None) or "utf-8"
    text = text.encode(encoding, "replace").decode(encoding)  # a console without UTF-8 gets '?', not a crash
    tqdm.write(text, file=stream)  # clears and redraws bars; without bars a plain write
    stream.flush()


def _has_size(stream: TextIO) -> bool:
    """Whether a terminal reports its width and height. Some do not, as in containers; bars fitted to them would be empty."""
    try:
        size = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        return False
    return size.columns > 0 and size.lines > 0


class Bar:
    """Progress of one loop: `with log.bar(5, "tasks") as bar: bar.update(1, loss=.2)`, or `for i in log.bar(5, "")`."""

    def __init__(self, total: int, text: str, level: int, every: float, console: bool, done: int):
        self.total, self.text, self.level, self.every = total, text, level, every
        self.done, self._first, self._start, self._last = done, done, time.monotonic(), -math.inf
        self._lines = console and not sys.stderr.isatty()
        self._tqdm = None
        if console and not self._lines:
            sized = _has_size(sys.stderr)
            self._tqdm = tqdm(
                total=total,
                initial=done,
                desc=text,
                position=level,
                leave=False,
                dynamic_ncols=sized,
                ncols=None if sized else 80,
                nrows=None if sized else 20,
                miniters=1,
                file=sys.stderr,
            )

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[int]:
        """Yields the remaining steps, from `done` to total-1, and counts one after each."""
        with self:
            for i in range(self._first, self.total):
                yield i
                self.update(1)

    def update(self, n: int = 1, **postfix: object) -> None:
        """Counts `n` finished steps and shows `postfix` after the count (floats with four digits)."""
        self.done += n
        shown = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in postfix.items()}
        if self._tqdm is not None:
            self._tqdm.set_postfix(shown, refresh=False)
            self._tqdm.update(n)
        elif self._lines:
            now = time.monotonic()
            if n > 0 and (self.done >= self.total or now - self._last >= self.every):
                self._last = now
                write_line(self._line(now - self._start, shown), sys.stderr)

    def _line(self, elapsed: float, shown: dict[str, str]) -> str:
        left = elapsed / max(self.done - self._first, 1) * max(self.total - self.done, 0)
        time_text = f"{clock(elapsed)} left {clock(left)}" if self.done < self.total else f"took {clock(elapsed)}"
        tail = "".join(f" {key}={value}" for key, value in shown.items())
        return f"{'  ' * self.level}{self.text} {self.done}/{self.total}, {time_text}{tail}"

    def close(self) -> None:
        """Removes the bar from the terminal. May be called again."""
        if self._tqdm is not None:
            self._tqdm.close()


@contextmanager
def of_images(console: bool = True, what: str = "images looked at") -> Iterator[Callable[[int, int], None]]:
    """A function to call with (images done, all), which shows a bar where it takes longer than SOON seconds."""
    bars: list[Bar] = []
    start = time.monotonic()

    def show(done: int, count: int) -> None:
        if not bars and console and done < count and time.monotonic() - start > SOON:
            bars.append(Bar(count, what, 0, 10.0, console, done))
        if bars:
            bars[0].update(done - bars[0].done)

    try:
        yield show
    finally:
        for bar in bars:
            bar.close()
