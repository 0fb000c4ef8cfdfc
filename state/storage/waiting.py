"""Waits for disk space: retries an action until it succeeds, logs the wait once and counts it."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from state.errors import RegistryError, StoreError, StoreFull
from state.metrics import StorageMetrics

RETRY_S = 0.5
Done = TypeVar("Done")
logger = logging.getLogger(__name__)


def is_full(error: BaseException) -> bool:
    """Whether an error, or one of its causes, means that a disk or store is full.

    >>> is_full(OSError(28, "No space left on device")), is_full(OSError(5, "Input/output error"))
    (True, False)
    >>> is_full(StoreFull("the map is full"))
    True
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, StoreFull):
            return True
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        cause = cause.__cause__
    return False


@contextmanager
def unless_full(say: Callable[[str], object]) -> Iterator[None]:
    """Ends the block without an exception if the disk is full, and reports the error by `say`; callers must retry."""
    try:
        yield
    except (StoreError, RegistryError, OSError) as error:
        if not is_full(error):
            raise
        say(str(error))


class Room:
    """Waits for disk space for one part of a process. One thread calls `wait_for`.

    Args:
        part: Name of the part in `state.storage.shares`.
        sleep: Sleeps for the given seconds; returns True if the wait is to end.
        say: A logger's method: takes a format string and its arguments.

    Attributes:
        waits: Whether an action was refused and has not succeeded since.
    """

    def __init__(
        self,
        part: str,
        metrics: StorageMetrics,
        sleep: Callable[[float], bool],
        say: Callable[..., object] = logger.warning,
    ) -> None:
        self._part, self._metrics, self._sleep, self._say = part, metrics, sleep, say
        self.waits = False

    def wait_for(self, act: Callable[[], Done], activity: str) -> Done:
        """Retries `act` while there is no disk space.

        A refused `act` must have changed nothing; `activity` names it in the log.

        Raises:
            StoreFull, UnusableRegistry, OSError: There is no space, and the wait is to end.
            Exception: Any other error of `act`.
        """
        while True:
            try:
                result = act()
            except (StoreError, RegistryError, OSError) as error:
                if not is_full(error):
                    raise
                self.refused(error, activity)
                if self._sleep(RETRY_S):
                    raise
            else:
                self.found(activity)
                return result

    def refused(self, error: BaseException, activity: str) -> None:
        """Records that there is no space; logs and counts it if that is new."""
        if not self.waits:
            self.waits = True
            self._metrics.waits.labels(self._part).inc()
            self._metrics.waiting.labels(self._part).inc()
            self._say("%s waits for space: %s", activity, error)

    def found(self, activity: str) -> None:
        """Records that there is space; logs it if that is new."""
        if self.waits:
            self.waits = False
            self._metrics.waiting.labels(self._part).dec()
            self._say("%s continues: there is space again", activity)
