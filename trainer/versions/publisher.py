"""Publishes versions in the background, one at a time, while the step thread goes on."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from state.metrics import TrainerMetrics
from state.registry.manifest import Draft, Manifest
from state.registry.registry import Registry
from state.storage.waiting import Room
from trainer.versions import content


class Publisher:
    """A thread that encodes, digests and syncs. The step thread calls every method.

    Where the registry's disk is full a version stays under way until there is
    room, while the steps go on; the next one holds all that they changed.

    Args:
        path: The registry's directory; the thread has a registry object of its own.
        metrics: Where durations go.
        room: Where a version waits for room; None: one that has none is an error.
    """

    def __init__(self, path: Path, metrics: TrainerMetrics, room: Room | None = None) -> None:
        self._room = room
        self._registry = Registry(path)
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._running: Future[Manifest] | None = None

    @property
    def busy(self) -> bool:
        """Whether a version is under way, or was not settled yet."""
        return self._running is not None

    def offer(self, draft: Draft, tensors: content.Tensors) -> None:
        """Starts to publish; `tensors` must not change any more. Not while busy."""
        if self.busy:
            raise RuntimeError("a version is still being published")
        self._running = self._thread.submit(self._publish, draft, tensors)

    def settle(self, wait: bool = False) -> Manifest | None:
        """The version that has become durable since the last call; None where none has.

        Args:
            wait: Wait for one that is under way.

        Raises:
            WrongEpoch: It was refused, because control is at another epoch.
            UnusableRegistry: The disk refused; where it is full, only once nobody is to wait any more.
        """
        running = self._running
        if running is None or not (wait or running.done()):
            return None
        self._running = None
        return running.result()

    def close(self) -> None:
        """Ends the thread after what is under way."""
        self._thread.shutdown(wait=True)

    def _publish(self, draft: Draft, tensors: content.Tensors) -> Manifest:
        began, files = time.perf_counter(), content.encode(tensors)

        def publish() -> Manifest:
            return self._registry.publish(draft, files)

        made = publish() if self._room is None else self._room.wait_for(publish, "publishing")
        self._metrics.publish_seconds.observe(time.perf_counter() - began)
        return made
