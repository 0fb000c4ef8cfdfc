"""A short-lived cache for slow reads: many clients of the page cost as much as one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from typing import Any


class LatelyRead:
    """Cache of recently read values; thread-safe.

    Args:
        clock_s: Monotonic seconds.

    >>> now_s = [0.0]
    >>> lately, numbers = LatelyRead(lambda: now_s[0]), iter(range(9))
    >>> [lately.of("versions", 2.0, lambda: next(numbers)) for _ in range(2)]
    [0, 0]
    >>> now_s[0] = 3.0
    >>> lately.of("versions", 2.0, lambda: next(numbers))
    1
    >>> lately.forget()
    >>> lately.of("versions", 2.0, lambda: next(numbers))
    2
    """

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._lock = threading.Lock()
        self._found: dict[Hashable, tuple[float, Any]] = {}

    def of(self, key: Hashable, keep_s: float, read: Callable[[], Any]) -> Any:
        """Returns what `read` returned within the last `keep_s`, or calls it; one thread reads, others wait for it."""
        with self._lock:
            known = self._found.get(key)
            if known is None or self._clock_s() - known[0] > keep_s:
                # Entries older than a minute are dropped, so that the cache stays small.
                self._found = {one: found for one, found in self._found.items() if self._clock_s() - found[0] <= 60.0}
                known = self._found[key] = (self._clock_s(), read())
            return known[1]

    def forget(self) -> None:
        """Clears the cache, after a change."""
        with self._lock:
            self._found.clear()
