"""Describes how a child ended: its exit status and the last line of its log."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

TAIL_BYTES = 8192
LONGEST_QUOTE = 300


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
    return shortened(as_text(next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")))


def as_text(line: str) -> str:
    """Returns a log line as plain text, also if `logs.format` is json.

    >>> as_text('{"time": "2026-07-03T10:00:00.000Z", "part": "stream", "level": "ERROR", "message": "LockHeld: ..."}')
    'stream ERROR LockHeld: ...'
    >>> as_text("Killed"), as_text("{no json")
    ('Killed', '{no json')
    """
    try:
        said = json.loads(line)
        return f"{said['part']} {said['level']} {said['message']}"
    except (ValueError, TypeError, KeyError):
        return line


def shortened(text: str, most: int = LONGEST_QUOTE) -> str:
    """Cuts a text to a length that a terminal can show.

    >>> shortened("one two three", 7)
    'one two...'
    """
    return text if len(text) <= most else f"{text[:most].rstrip()}..."
