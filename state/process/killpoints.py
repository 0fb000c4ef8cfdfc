"""Named places where a process may be killed, so that tests can crash it between any two steps.

`SPRINGTIDE_KILL_AT=publish.renamed:3` kills the process, as kill -9 does, when
it reaches that place for the third time; `publish.renamed:3:stop` stops it
there, as kill -STOP does. Switched off, a place costs one comparison.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass

VARIABLE = "SPRINGTIDE_KILL_AT"
STOP = ":stop"


@dataclass
class Armed:
    """A place that is waited for.

    Attributes:
        name: The place.
        left: How often it must still be reached.
        strike: What then happens.
    """

    name: str
    left: int
    strike: Callable[[], None]


def parse(text: str, strike: Callable[[], None]) -> Armed | None:
    """The place that `name`, `name:count` or `name:count:stop` arms; None for the empty text.

    >>> parse("publish.renamed:3", lambda: None).left, parse("", lambda: None)
    (3, None)

    Raises:
        ValueError: The count is no number.
    """
    if not text:
        return None
    name, _, count = text.removesuffix(STOP).partition(":")
    return Armed(name, int(count or 1), strike)


def _kill() -> None:
    """Ends this process at once, with nothing flushed."""
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    """Stops this process until somebody continues it."""
    # To this thread: sent to the process, another thread may take it, and this one would go on for a while.
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


_wanted = os.environ.get(VARIABLE, "")
armed: Armed | None = parse(_wanted, _stop if _wanted.endswith(STOP) else _kill)


def reach(name: str) -> None:
    """Strikes if `name` is armed and was reached often enough."""
    if armed is None or armed.name != name:
        return
    armed.left -= 1
    if armed.left == 0:
        armed.strike()
