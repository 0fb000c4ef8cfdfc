"""Output of a rebuild of the histories: its progress while it reads the log, and its result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from state.process.progress_line import ProgressLine, bar

BAR = 30
LINE_EVERY_S = 5.0


@dataclass
class Rebuilt:
    """The result of a rebuild.

    Attributes:
        records: Records of the micro-batch log.
        rows: Events taken from them.
        clicks: Positions taken from the clicks instead.
        unreadable: Damaged records of the log; their positions were taken from the clicks.
        lost: Positions that neither topic contains any more.
        users: Users with a history.
        incomplete: Users whose history may lack its oldest events: those with fewer than N events, if positions are
            lost.
        aside: Current path of the old store.
    """

    records: int = 0
    rows: int = 0
    clicks: int = 0
    unreadable: int = 0
    lost: int = 0
    users: int = 0
    incomplete: int = 0
    aside: Path | None = None


def told(found: Rebuilt, place: Path) -> str:
    """Formats the result in one line.

    >>> told(Rebuilt(records=10, rows=500, users=17), Path("histories"))
    'histories: 17 users, 500 rows of 10 records of the log; complete'
    >>> told(Rebuilt(records=10, rows=500, clicks=40, lost=60, users=17, incomplete=3), Path("h"))
    'h: 17 users, 500 rows of 10 records of the log and 40 positions of the clicks; 60 positions are gone from both: 3 users may lack their oldest events'
    """
    read = f"{found.rows:,} rows of {found.records:,} records of the log"
    read += f" and {found.clicks:,} positions of the clicks" if found.clicks else ""
    read += f" ({found.unreadable:,} records unreadable)" if found.unreadable else ""
    gone = "complete"
    if found.lost:
        gone = f"{found.lost:,} positions are gone from both: {found.incomplete:,} users may lack their oldest events"
    aside = f"; the old store is {found.aside}, remove it when you like" if found.aside else ""
    return f"{place}: {found.users:,} users, {read}; {gone}{aside}"


def progress_line(done: int, total: int, rows: int, seconds: float) -> str:
    """Formats the progress through the log in one line.

    >>> progress_line(500, 1000, 90_000, 3.0)
    '[###############---------------]  50 %  500 of 1,000 positions of the log  90,000 rows  30,000 rows/s'
    """
    rate = rows / max(seconds, 1e-9)
    return f"{bar(done, total, BAR)}  {done:,} of {total:,} positions of the log  {rows:,} rows  {rate:,.0f} rows/s"


def progress_on(out: TextIO) -> ProgressLine:
    """Displays the progress of a rebuild: one updating line on a terminal, otherwise a line every few seconds."""
    return ProgressLine(out, LINE_EVERY_S, at_once=True)
