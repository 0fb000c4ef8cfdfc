"""How child processes end: on request, or by themselves; and when they start again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from state.errors import StoreFull, UnreachableBroker, UnusableDisk, UnusablePlace, UnusableRegistry

WAITS_FOR_OTHERS = (UnreachableBroker, StoreFull, UnusableDisk, UnusablePlace, UnusableRegistry)
FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 30.0
LONGEST_WAIT_FOR_OTHERS_S = 4.0
HEALTHY_S = 60.0
TAIL_BYTES = 8192
LONGEST_QUOTE = 300


def end(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Ends a child and waits for it: SIGTERM, then SIGKILL after the timeout. The child may have ended before."""
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def has_ended(process: psutil.Process) -> bool:
    """Returns whether a process has ended; a zombie, which its parent has not waited for, counts as ended."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def how(status: int) -> str:
    """Describes an exit status.

    >>> how(1), how(-9)
    ('exit 1', 'SIGKILL')
    """
    return f"exit {status}" if status >= 0 else signal.Signals(-status).name


def last_line(log: Path) -> str:
    """Returns the last nonempty line of a log."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines: Sequence[str] = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        lines = ()
    return shortened(as_text(next((line.strip() for line in reversed(lines) if line.strip()), "no output")))


def as_text(line: str) -> str:
    """Returns a log line as plain text, also if `logs.format` is json.

    >>> as_text('{"time": "2026-07-03T10:00:00.000Z", "part": "stream", "level": "ERROR", "message": "LockHeld: ..."}')
    'stream ERROR LockHeld: ...'
    >>> as_text("Killed"), as_text("{no json")
    ('Killed', '{no json')
    """
    try:
        entry = json.loads(line)
        return f"{entry['part']} {entry['level']} {entry['message']}"
    except (ValueError, TypeError, KeyError):
        return line


def shortened(text: str, most: int = LONGEST_QUOTE) -> str:
    """Cuts a text to a length that a terminal can show.

    >>> shortened("one two three", 7)
    'one two...'
    """
    return text if len(text) <= most else f"{text[:most].rstrip()}..."


@dataclass(frozen=True)
class Backoff:
    """Consecutive deaths of a process without a healthy run between them.

    Attributes:
        waits_for_others: Whether the process died because a broker, a disk or a store was unavailable. It should run soon
            after that is available again, so its waits are shorter.
    """

    deaths: int = 0
    waits_for_others: bool = False

    def after(self, lived_s: float, last_line: str = "") -> Backoff:
        """Returns the backoff after one more death; after a healthy run it counts as the first.

        Args:
            lived_s: How long the process ran.
            last_line: The last line of its log, which names the class of the error.

        >>> Backoff(3).after(1.0).deaths, Backoff(3).after(60.0).deaths
        (4, 1)
        >>> Backoff().after(1.0, "trainer ERROR UnusableRegistry: registry: Permission denied").waits_for_others
        True
        """
        others = any(f" {error.__name__}: " in last_line for error in WAITS_FOR_OTHERS)
        return Backoff(1 if lived_s >= HEALTHY_S else self.deaths + 1, others)

    @property
    def wait_s(self) -> float:
        """How long to wait before the next start; 0 if there was no death.

        >>> [Backoff(deaths).wait_s for deaths in (0, 1, 2, 3, 7, 8, 99)]
        [0.0, 0.25, 0.5, 1.0, 16.0, 30.0, 30.0]
        >>> Backoff(99, waits_for_others=True).wait_s
        4.0
        """
        if not self.deaths:
            return 0.0
        # The exponent is capped, so that the power cannot overflow after many deaths.
        longest_s = LONGEST_WAIT_FOR_OTHERS_S if self.waits_for_others else LONGEST_WAIT_S
        return min(longest_s, FIRST_WAIT_S * 2.0 ** min(self.deaths - 1, 16))

    def as_text(self) -> str:
        """Describes when the next start is and how often the process died.

        >>> Backoff(1).as_text(), Backoff(3).as_text()
        ('starting it again in 0.25 s', 'starting it again in 1 s, after 3 deaths in a row')
        """
        often = f", after {self.deaths} deaths in a row" if self.deaths > 1 else ""
        return f"starting it again in {self.wait_s:g} s{often}"
