"""Progress of a long command: one line that is updated in place on a terminal, otherwise periodic lines."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

TERMINAL_EVERY_S = 0.2
CLEAR = "\r\x1b[K"


def bar(done: int, total: int, width: int) -> str:
    """A progress bar with the share in percent.

    >>> bar(500, 1000, 10)
    '[#####-----]  50 %'
    """
    filled = width * done // max(total, 1)
    return f"[{'#' * filled}{'-' * (width - filled)}] {100 * done // max(total, 1):3d} %"


class ProgressLine:
    """Writes progress lines: on a terminal each replaces the previous one, otherwise one every `line_every_s`."""

    def __init__(
        self, out: TextIO, line_every_s: float, monotonic_s: Callable[[], float] = time.monotonic, at_once: bool = False
    ) -> None:
        self._out = out
        self._terminal = out.isatty()
        self._every_s = TERMINAL_EVERY_S if self._terminal else line_every_s
        self._monotonic_s = monotonic_s
        self._begun_s = monotonic_s()
        self._shown_s = float("-inf") if at_once and self._terminal else self._begun_s
        self._open = False

    @property
    def took_s(self) -> float:
        """Seconds since the start, never 0."""
        return max(self._monotonic_s() - self._begun_s, 1e-9)

    def show(self, line: Callable[[], str], last: bool = False) -> None:
        """Shows a line if one is due. With `last` it is always shown, and is not replaced."""
        now_s = self._monotonic_s()
        if not last and now_s - self._shown_s < self._every_s:
            return
        self._shown_s = now_s
        self._open = self._terminal and not last
        self._write(f"{CLEAR}{line()}{chr(10) * last}" if self._terminal else f"{line()}\n")

    def say(self, line: str) -> None:
        """Writes a line that is not replaced."""
        self._write(f"{CLEAR * self._open}{line}\n")
        self._open = False

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
