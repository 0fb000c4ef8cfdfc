"""Versions that could not be had a moment ago: each is said once, and tried again after a while."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from state.errors import CorruptVersion
from state.metrics import ApplierMetrics
from state.registry.manifest import Manifest

RETRY_MS = 1000
REMEMBERED = 1000
_log = logging.getLogger(__name__)


class Refusals:
    """Remembers what was corrupt or gone.

    Args:
        metrics: Of the applier.
        now_ms: The wall clock.
    """

    def __init__(self, metrics: ApplierMetrics, now_ms: Callable[[], int]) -> None:
        self._metrics = metrics
        self._now_ms = now_ms
        self._again_ms: dict[tuple[str, int], int] = {}

    def add(self, kind: str, version: int, error: Exception, answering: str) -> None:
        """Remembers for a second that a version cannot be had, and says so once.

        Args:
            kind: `manifest`, `delta`, `base`, or `probe`, which is not tried again.
            version: Which.
            error: Why.
            answering: What goes on answering.
        """
        if (kind, version) not in self._again_ms:
            if isinstance(error, CorruptVersion):
                self._metrics.corrupt_versions.inc()
            _log.warning("%s; %s goes on answering", error, answering)
        self._again_ms[kind, version] = self._now_ms() + RETRY_MS
        if len(self._again_ms) > REMEMBERED:
            # The one that was refused first.
            del self._again_ms[next(iter(self._again_ms))]

    def blocks(self, steps: Iterable[Manifest]) -> bool:
        """Whether one of these versions was refused a moment ago."""
        now_ms = self._now_ms()
        # The upper bound is for a wall clock that was set back.
        return any(now_ms < self._again_ms.get((step.kind, step.version), 0) <= now_ms + RETRY_MS for step in steps)

    def of_manifests(self) -> bool:
        """Whether a manifest could not be read since the last `clear`."""
        return any(kind == "manifest" for kind, _ in self._again_ms)

    def clear(self) -> None:
        """Forgets all of it."""
        self._again_ms.clear()
