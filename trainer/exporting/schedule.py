"""Exports beside the trainer: a child now and then, where a setting asks for it."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)


class ScheduledExports:
    """Starts `springtide export` every so often, one at a time, with the trainer's own settings.

    Args:
        arguments: The command line of this process.
        every_s: Seconds from one start to the next; 0: never.
        elapsed: Monotonic seconds.
        module: What is run.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        every_s: float,
        elapsed: Callable[[], float] = time.monotonic,
        module: str = "trainer.exporting.command",
    ) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._every_s, self._elapsed = every_s, elapsed
        self._next_s = elapsed() + every_s
        self._child: subprocess.Popen[bytes] | None = None

    def tick(self) -> None:
        """Starts one that is due, and takes note of one that ended: a failure is said, and the next one is tried in its turn."""
        if self._child is not None:
            code = self._child.poll()
            if code is None:
                return
            if code != 0:
                logger.error("an export failed with exit code %d; the next one is tried in %g s", code, self._every_s)
            self._child = None
        if self._every_s and self._elapsed() >= self._next_s:
            self._next_s = self._elapsed() + self._every_s
            self._child = subprocess.Popen(self._command)

    def close(self) -> None:
        """Ends a child; what it had not finished has no place."""
        if self._child is not None:
            self._child.terminate()
            self._child.wait()
