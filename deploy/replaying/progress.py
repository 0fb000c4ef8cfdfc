"""Shows the progress of a replay: one updating line in a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO

from state.process.progress_line import ProgressLine, bar

LINE_EVERY_S = 10.0
BAR = 20
NAMED_ROWS = 5


def progress_line(done: int, total: int | None, rate: float, bad: int, called: str = "dead letter") -> str:
    """Formats the progress of a replay as one line; `called` is the name of a bad row.

    >>> progress_line(500, 1000, 250.0, 2)
    '[##########----------]  50 %  500 of 1,000 rows  250 rows/s  2 dead letters'
    >>> progress_line(500, None, 250.0, 0)
    '500 rows  250 rows/s  0 dead letters'
    """
    letters = f"{bad:,} {called}{'s' * (bad != 1)}"
    if not total:
        return f"{done:,} rows  {rate:,.0f} rows/s  {letters}"
    return f"{bar(done, total, BAR)}  {done:,} of {total:,} rows  {rate:,.0f} rows/s  {letters}"


class Progress:
    """Writes the progress of one replay.

    Args:
        out: Where to write.
        monotonic_s: Monotonic clock, seconds.
        row: Name of a good row.
        called: Name of a bad row.
    """

    def __init__(
        self, out: TextIO, monotonic_s: Callable[[], float], row: str = "click", called: str = "dead letter"
    ) -> None:
        self._row, self._called = row, called
        self._line = ProgressLine(out, LINE_EVERY_S, monotonic_s)
        self._named = 0

    @property
    def took_s(self) -> float:
        """Seconds since the beginning."""
        return self._line.took_s

    def show(self, sent: int, done: int, total: int | None, bad: int) -> None:
        """Shows the progress if an update is due.

        Args:
            sent: Rows of this run.
            done: Rows of this run and earlier runs.
            total: Rows of the recording; None if they are not counted yet.
            bad: Bad rows.
        """
        self._line.show(lambda: progress_line(done, total, sent / self.took_s, bad, self._called))

    def name(self, row: str, reason: str) -> None:
        """Reports a bad row; after the first few, bad rows are only counted and shown at the end."""
        self._named += 1
        if self._named <= NAMED_ROWS:
            self.say(f"{row}: no {self._row}: {reason}")
        elif self._named == NAMED_ROWS + 1:
            self.say(f"further rows that are no {self._row}s are counted, not named")

    def say(self, line: str) -> None:
        """Writes a separate line."""
        self._line.say(line)
