"""Waits for room where a disk is full: what was refused is done again until it is done, is said once, and is counted."""

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
    """Whether an error says that there is no room, itself or what it came from.

    >>> is_full(OSError(28, "No space left on device")), is_full(OSError(5, "Input/output error"))
    (True, False)
    >>> is_full(StoreFull("the map is full"))
    True
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, StoreFull):
            return True
        if isinstance(found, OSError) and found.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        found = found.__cause__
    return False


@contextmanager
def unless_full(say: Callable[[str], object]) -> Iterator[None]:
    """Ends the block where the disk is full, and says so: the caller sees that it was not done, and comes again.

    Args:
        say: Takes what was refused, and what to do.
    """
    try:
        yield
    except (StoreError, RegistryError, OSError) as error:
        if not is_full(error):
            raise
        say(str(error))


class Room:
    """The room that one part of a process needs. One thread calls `wait_for`.

    Args:
        part: Which one, of `state.storage.shares`.
        metrics: Of this process.
        sleep: Waits so many seconds; True where nobody is to wait any more.
        say: Takes a form and what goes into it, as a logger's methods do.
    """

    def __init__(
        self,
        part: str,
        metrics: StorageMetrics,
        sleep: Callable[[float], bool],
        say: Callable[..., object] = logger.warning,
    ) -> None:
        self._part, self._metrics, self._sleep, self._say = part, metrics, sleep, say
        self._waits = False

    @property
    def waits(self) -> bool:
        """Whether something was refused and not done since."""
        return self._waits

    def wait_for(self, act: Callable[[], Done], what: str) -> Done:
        """Does `act` again and again while it is refused for want of room; it must change nothing where it is refused.

        Args:
            act: What needs room.
            what: What waits, for the log.

        Raises:
            StoreFull, UnusableRegistry, OSError: There is no room, and nobody is to wait any more.
            Exception: What `act` raises for another reason.
        """
        while True:
            try:
                done = act()
            except (StoreError, RegistryError, OSError) as error:
                if not is_full(error):
                    raise
                self.refused(error, what)
                if self._sleep(RETRY_S):
                    raise
            else:
                self.found(what)
                return done

    def refused(self, error: BaseException, what: str) -> None:
        """There is no room: says so where that is new, and counts it."""
        if not self._waits:
            self._waits = True
            self._metrics.waits.labels(self._part).inc()
            self._metrics.waiting.labels(self._part).inc()
            self._say("%s waits for room: %s", what, error)

    def found(self, what: str) -> None:
        """There is room: says so where that is new."""
        if self._waits:
            self._waits = False
            self._metrics.waiting.labels(self._part).dec()
            self._say("%s goes on: there is room again", what)
