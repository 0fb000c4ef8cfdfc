"""Ends a process: on a signal, on a logged error, with its parent, or when its output has no reader."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from state.errors import SpringtideError, of_disk

_PR_SET_PDEATHSIG = 1


def stop_on_signals() -> threading.Event:
    """Returns an event that SIGTERM and SIGINT set from now on; call it in the main thread."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


class Signals:
    """Counts SIGINT, SIGTERM and SIGHUP: the first asks to stop, the second to stop at once."""

    def __init__(self) -> None:
        self.count = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._take)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    def stop(self) -> bool:
        """Returns whether to stop."""
        return self.count > 0

    def hurry(self) -> bool:
        """Returns whether to stop at once."""
        return self.count > 1


def die_with(parent: int, signal_number: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """Returns a function that binds a child to its parent; the child calls it between fork and exec, or later.

    The kernel then ends the child with the signal `signal_number` when the parent's thread that started it ends.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def arrange() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal_number)
            # The parent may have ended before prctl was called.
            if os.getppid() != parent:
                os._exit(1)

    return arrange


def reported(work: Callable[[], int | None], logger: logging.Logger) -> int:
    """Runs a process's work; returns its exit code, and logs an error that ends it in one line with its class."""
    try:
        return work() or 0
    except (SpringtideError, OSError) as problem:
        error = of_disk(problem)
        logger.error("%s: %s", type(error).__name__, error)
        return error.exit_code


def while_read(main: Callable[[], int]) -> int:
    """Runs a command that prints to standard output; returns its exit code, or 0 if the reader closed the pipe.

    `head`, for example, closes the pipe after ten lines.
    """
    try:
        code = main()
        # Flushes here, where a broken pipe can be caught, rather than at Python's exit.
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes again at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code
