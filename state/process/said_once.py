"""Logs a line only when it differs from the previous one, so that a waiting loop does not fill the log."""

from __future__ import annotations

from collections.abc import Callable


class SaidOnce:
    """Logs lines, but skips one that equals the previous line. `log` takes a format string and its argument.

    >>> say = SaidOnce(lambda form, line: print(form % line))
    >>> for line in ("waiting", "waiting", "there"):
    ...     say(line)
    waiting
    there
    """

    def __init__(self, log: Callable[[str, str], object]) -> None:
        self._log = log
        self._last = ""

    def __call__(self, line: str) -> None:
        """Logs the line if it differs from the last one."""
        if line != self._last:
            self._last = line
            self._log("%s", line)

    def clear(self) -> None:
        """Allows the same line to be logged again."""
        self._last = ""
