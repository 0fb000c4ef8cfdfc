"""Ends a child when its parent is gone, however the parent ended (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def die_with(parent: int, by: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """A function for a child, between fork and exec or later: the kernel ends it when the parent's starting thread ends.

    Args:
        parent: The parent's process id.
        by: The signal that ends the child.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def arrange() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, by)
            # The parent may have ended before the kernel was asked.
            if os.getppid() != parent:
                os._exit(1)

    return arrange
