"""What a process takes from its surroundings: the wall clock, the person who runs it, its priority and its memory."""

from __future__ import annotations

import ctypes
import gc
import getpass
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple


def wall_ms() -> int:
    """Milliseconds since the Unix epoch."""
    return time.time_ns() // 1_000_000


class Clocks(NamedTuple):
    """The clocks of a part; tests and benches set them.

    Attributes:
        wall: Seconds since the Unix epoch; the clock may be set.
        elapsed: Seconds that only grow.
    """

    wall: Callable[[], float] = time.time
    elapsed: Callable[[], float] = time.monotonic


CLOCKS = Clocks()
"""The clocks of the machine."""

_named: ContextVar[str] = ContextVar("actor", default="")


def actor() -> str:
    """The name set by `acting`, or else the operating system's user; with sudo, the user who called it."""
    if named := _named.get():
        return named
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


@contextmanager
def acting(name: str) -> Iterator[None]:
    """Sets the actor for commands within the block, for a process that acts on a user's behalf."""
    before = _named.set(name)
    try:
        yield
    finally:
        _named.reset(before)


NICENESS = 10
TRIM_EVERY_S = 10.0


def run_in_background() -> None:
    """Lets this process run after the stream, the trainer and serving: raises its niceness.

    If it leads a session, the niceness of the session is raised too.

    Linux weighs sessions before processes where `kernel.sched_autogroup_enabled` is set.
    """
    niceness = os.nice(NICENESS)
    if os.getsid(0) == os.getpid():
        with suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(niceness))


def freeze_objects() -> None:
    """Excludes all existing objects, such as modules, from garbage collection; call it once a process is set up.

    Python collects old objects only when the new long-lived objects reach a quarter of their number. That is rare with
    TensorFlow's million objects. After this call, collections are frequent and cheap.
    """
    gc.collect()
    gc.freeze()
    # Only a full collection updates the count of old objects.
    gc.collect()


class Holes:
    """Returns free heap memory to the system every ten seconds, in 1 to 3 ms; call `tick` in a loop.

    By itself, glibc returns only memory at the end of its heap. Memory freed between live blocks is reused only if a
    new block fits. Without trimming, a trainer's heap grows for hours.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next_s = clock() + TRIM_EVERY_S
        # Only glibc has malloc_trim.
        self._trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def tick(self) -> None:
        """Trims the heap if ten seconds have passed."""
        if self._trim is not None and (now_s := self._clock()) >= self._next_s:
            self._trim(0)
            self._next_s = now_s + TRIM_EVERY_S
