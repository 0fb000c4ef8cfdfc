"""Says a line only when it is another one than before: a loop that waits does not fill the log."""

from __future__ import annotations

from collections.abc import Callable


class SaidOnce:
    """Takes lines and passes on those that differ from the last.

    Args:
        log: Takes a form and what goes into it, as a logger's methods do.

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
        """Says the line, where it differs from the last one."""
        if line != self._last:
            self._last = line
            self._log("%s", line)

    def clear(self) -> None:
        """Lets the same line be said again."""
        self._last = ""
