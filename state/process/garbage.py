"""Keeps small what a process that lives for long has and does not need: its garbage, and the holes in its heap."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable

EVERY_S = 10.0


def keep_what_is_there() -> None:
    """Takes all objects of now, modules above all, out of what the collector looks at; called once a process is set up.

    Python looks for unused cycles among old objects only once a quarter as many new ones have come to stay. Beside the
    million objects of TensorFlow that is hardly ever, and cycles hold whole arrays meanwhile; once it comes, it takes
    half a second. Afterwards there are few old objects, so that it comes often and takes nothing to speak of.
    """
    gc.collect()
    gc.freeze()
    # Only a full collection counts the old objects anew.
    gc.collect()


class Holes:
    """Gives the holes in the heap back to the machine every ten seconds, in 1 to 3 ms; for loops that turn more often.

    glibc itself gives back only what is free at the end of its heap, and what is freed between pieces that stay is used
    again only where something fits: a trainer's heap would grow for hours.

    Args:
        clock: Seconds that only rise.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next_s = clock() + EVERY_S
        # Another libc than glibc has its own ways.
        self._trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def tick(self) -> None:
        """Gives them back where it is time."""
        if self._trim is not None and (now_s := self._clock()) >= self._next_s:
            self._trim(0)
            self._next_s = now_s + EVERY_S
