"""The compactor beside the trainer: a child now and then, and what to look at when one fails."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from state.errors import CorruptVersion
from state.metrics import TrainerMetrics
from state.registry.registry import Registry

HURRY_S = 30.0
logger = logging.getLogger(__name__)


class Compaction:
    """Starts the compactor every so often, one at a time, with the trainer's own settings.

    Args:
        arguments: The command line of this process.
        every_s: Seconds from one start to the next.
        on_failure: What to look at when one fails.
        metrics: Where is told how many failed in a row.
        elapsed: Monotonic seconds.

    Where publishing waits for room one is started sooner: it removes what is beyond its tier.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        every_s: float,
        on_failure: Callable[[], None] = lambda: None,
        metrics: TrainerMetrics | None = None,
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        self._command = [sys.executable, "-m", "trainer.compactor", *arguments]
        self._every_s, self._elapsed, self._on_failure = every_s, elapsed, on_failure
        self._last_s = elapsed()
        self._next_s = self._last_s + every_s
        self._child: subprocess.Popen[bytes] | None = None
        self._metrics, self._failures = metrics, 0

    def tick(self, hurry: bool = False) -> None:
        """Starts one that is due and takes note of one that ended.

        Args:
            hurry: Whether the disk is full.

        Raises:
            SpringtideError: What `on_failure` found.
        """
        if self._child is not None:
            code = self._child.poll()
            if code is None:
                return
            if code != 0:
                logger.error("the compactor failed with exit code %d; versions take room until one succeeds", code)
            self._child = None
            self._failures = self._failures + 1 if code != 0 else 0
            if self._metrics is not None:
                self._metrics.compactor_failures.set(self._failures)
            if code != 0:
                self._on_failure()
        due_s = min(self._next_s, self._last_s + HURRY_S) if hurry else self._next_s
        if self._elapsed() >= due_s:
            self._last_s = self._elapsed()
            self._next_s = self._last_s + self._every_s
            self._child = subprocess.Popen(self._command)

    def close(self) -> None:
        """Ends a child; what it had not finished is absent."""
        if self._child is not None:
            self._child.terminate()
            self._child.wait()


def doubt(registry: Registry, version: int) -> None:
    """Reads all that `version` is made from, while the trainer waits: what is built on damage can never be restored.

    Raises:
        CorruptVersion: A part of it is damaged.
    """
    try:
        base, deltas = registry.chain(version)
        for part in (base, *deltas):
            registry.verify(part)
    except CorruptVersion as error:
        raise CorruptVersion(
            error.what,
            f"{error.do}, or start the trainer again: it sets the damaged one aside and learns what came after from the log",
        ) from error
