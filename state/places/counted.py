"""Counts the requests to a file store, by operation and outcome, and the bytes transferred."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from state.metrics import SharedMetrics
from state.places.place import FilePlace

Answer = TypeVar("Answer")


class CountedPlace:
    """A `FilePlace` that counts its requests.

    Args:
        place: The file store.
        metrics: The counters.
    """

    def __init__(self, place: FilePlace, metrics: SharedMetrics) -> None:
        self._place, self._metrics = place, metrics
        self.told = place.told

    def names(self, folder: str) -> list[str]:
        """See `FilePlace`. A store that lists a thousand names per request receives more requests than are counted."""
        return self._counted("list", lambda: self._place.names(folder))

    def read(self, name: str) -> bytes:
        """See `FilePlace`."""
        data = self._counted("get", lambda: self._place.read(name))
        self._metrics.bytes.labels("received").inc(len(data))
        return data

    def write(self, name: str, data: bytes) -> None:
        """See `FilePlace`."""
        self._counted("put", lambda: self._place.write(name, data))
        self._metrics.bytes.labels("sent").inc(len(data))

    def create(self, name: str, data: bytes) -> bool:
        """See `FilePlace`."""
        made = self._counted("put", lambda: self._place.create(name, data))
        self._metrics.bytes.labels("sent").inc(len(data))
        return made

    def remove(self, name: str) -> None:
        """See `FilePlace`."""
        self._counted("delete", lambda: self._place.remove(name))

    def _counted(self, operation: str, ask: Callable[[], Answer]) -> Answer:
        self._metrics.requests.labels(operation).inc()
        return ask()
