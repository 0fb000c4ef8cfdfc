"""How a child ended, in words: its status and the last line of its log."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

TAIL_BYTES = 8192
LONGEST_QUOTE = 300


def how(status: int) -> str:
    """A process's end in words.

    >>> how(1), how(-9)
    ('exit 1', 'SIGKILL')
    """
    return f"exit {status}" if status >= 0 else signal.Signals(-status).name


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines: Sequence[str] = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        lines = ()
    return shortened(next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing"))


def shortened(text: str, most: int = LONGEST_QUOTE) -> str:
    """A text cut to a length that a terminal can show.

    >>> shortened("one two three", 7)
    'one two...'
    """
    return text if len(text) <= most else f"{text[:most].rstrip()}..."
