"""Ends a child process when its parent ends, however the parent ended (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def die_with(parent: int, by: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """Returns a function that binds a child to its parent; the child calls it between fork and exec, or later.

    The kernel then ends the child when the parent's thread that started it ends.

    Args:
        parent: The parent's process id.
        by: The signal that ends the child.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def arrange() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, by)
            # The parent may have ended before prctl was called.
            if os.getppid() != parent:
                os._exit(1)

    return arrange
