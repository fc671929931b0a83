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
    """Progress of one loop: `with log.bar(5, "tasks") as bar: bar.update(1, loss=.2)`, or `for i in log.bar(5, "")`.

    `around` is the bar of the loop of which this one is a part, such as the tasks around the epochs; `later` are steps that
    follow this bar's in the same command, such as the tasks of later seeds: they count in the time left."""

    def __init__(
        self,
        total: int,
        text: str,
        level: int,
        every: float,
        console: bool,
        done: int,
        around: Bar | None = None,
        later: int = 0,
    ):
        self.total, self.text, self.level, self.every = total, text, level, every
        self.around, self.later = around, later
        self._share = 0.0  # of the step in progress
        self._parts, self._parts_before = 0, 1  # bars inside the step in progress, and inside the one before
        if around is not None:
            around._parts += 1
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
                miniters=0,
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
        self._share = 0.0
        self._tell_around()
        if n > 0 and self._parts:
            self._parts_before, self._parts = self._parts, 0
        shown = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in postfix.items()}
        if self._tqdm is not None:
            self._show(shown)
        elif self._lines:
            now = time.monotonic()
            if n > 0 and (self.done >= self.total or now - self._last >= self.every):
                self._last = now
                write_line(self._line(now - self._start, shown), sys.stderr)

    def within(self, share: float, from_inside: bool = False) -> None:
        """Says how much of the step in progress is done, from 0 to 1; may be called often. `from_inside`: by the bar of a part,
        which prints the lines."""
        self._share = min(max(share, self._share), 1.0)
        self._tell_around()
        if self._tqdm is not None:
            self._show({})
        elif self._lines and not from_inside and time.monotonic() - max(self._last, self._start) >= self.every:
            self._last = time.monotonic()
            write_line(self._line(self._last - self._start, {}), sys.stderr)

    def seconds_left(self) -> float | None:
        """Seconds until this bar and the `later` steps are done, if each takes as long as those so far; None before any."""
        passed = self.done - self._first + self._share
        left = self.total - self.done - self._share + self.later
        return (time.monotonic() - self._start) / passed * max(left, 0.0) if passed > 0 else None

    def _tell_around(self) -> None:
        """Moves the bar around this one: its step has as many parts as the step before had."""
        around = self.around
        if around is not None and self.total > 0:
            inside = min((self.done + self._share) / self.total, 1.0)
            around.within((around._parts - 1 + inside) / max(around._parts_before, around._parts), True)

    def _whole(self) -> str:
        """The time left for all of the command, where this bar shows a part of it."""
        top: Bar = self
        while top.around is not None:
            top = top.around
        seconds = top.seconds_left() if top is not self or self.later else None
        return "" if seconds is None else clock(seconds)

    def _show(self, shown: dict[str, str]) -> None:
        """Brings the terminal's bar up to date, at most ten times a second."""
        assert self._tqdm is not None
        if whole := self._whole():
            shown = {**shown, "all": f"{whole} left"}
        if shown:
            self._tqdm.set_postfix(shown, refresh=False)
        self._tqdm.update(self.done + round(self._share, 2) - self._tqdm.n)

    def _line(self, elapsed: float, shown: dict[str, str]) -> str:
        left = elapsed / max(self.done - self._first + self._share, 1e-9) * max(self.total - self.done - self._share, 0)
        time_text = f"{clock(elapsed)} left {clock(left)}" if self.done < self.total else f"took {clock(elapsed)}"
        if whole := self._whole():
            time_text += f", all left {whole}"
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
