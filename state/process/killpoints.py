"""Named kill points: places in the code where a test can kill or stop the process, to crash it between any two steps.

`SPRINGTIDE_KILL_AT=publish.renamed:3` kills the process with SIGKILL when it reaches that kill point for the third
time. `publish.renamed:3:stop` stops it there with SIGSTOP. A kill point that is not armed costs one comparison.
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
    """An armed kill point: `strike` kills or stops the process after the point was reached `left` more times."""

    name: str
    left: int
    strike: Callable[[], None]


def parse(text: str, strike: Callable[[], None]) -> Armed | None:
    """Parses `name`, `name:count` or `name:count:stop`; returns None for an empty string."""
    if not text:
        return None
    name, _, count = text.removesuffix(STOP).partition(":")
    return Armed(name, int(count or 1), strike)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    # Sends the signal to this thread. If it were sent to the process, another thread might receive it while this
    # thread continues.
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


_wanted = os.environ.get(VARIABLE, "")
armed: Armed | None = parse(_wanted, _stop if _wanted.endswith(STOP) else _kill)


def reach(name: str) -> None:
    """Counts one visit to the kill point `name`, and triggers it if it is armed and the count is reached."""
    if armed is None or armed.name != name:
        return
    armed.left -= 1
    if armed.left == 0:
        armed.strike()
