"""Ends a process: on a signal, or on an error that is logged in one line."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable

from state.errors import SpringtideError, of_disk


def stop_on_signals() -> threading.Event:
    """Returns an event that SIGTERM and SIGINT set from now on; call it in the main thread."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def reported(work: Callable[[], int | None], logger: logging.Logger) -> int:
    """Runs a process's work; returns its exit code, and logs an error that ends it in one line with its class.

    >>> reported(lambda: None, logging.getLogger(__name__))
    0
    """
    try:
        return work() or 0
    except (SpringtideError, OSError) as problem:
        error = of_disk(problem)
        logger.error("%s: %s", type(error).__name__, error)
        return error.exit_code
