"""Publishes versions in a background thread, one at a time, while the step thread continues."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from state.errors import UnusableRegistry
from state.metrics import TrainerMetrics
from state.registry.manifest import Draft, Manifest
from state.registry.registry import RECENT_S, Registry
from state.storage import Room
from trainer.versions import content


@dataclass(frozen=True)
class Saving:
    """The data that makes a version durable: its draft relative to the previous durable version, and the changes since then."""

    draft: Draft
    tensors: content.Tensors


class Publisher:
    """A thread that encodes, digests and syncs versions. The step thread calls every method.

    If the registry's disk is full, a version waits for free space while the steps continue. The next version contains
    all of their changes.

    Args:
        recent_s: How long a version stays in `recent/`; the newest one stays until there is another.
        room: Waits for free disk space; with None, a full disk is an error.
    """

    def __init__(
        self,
        registry: Registry,
        metrics: TrainerMetrics,
        recent_s: float = RECENT_S,
        room: Room | None = None,
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        self._room = room
        self._registry = Registry(registry.path, registry.directory.claim)
        self._metrics = metrics
        self._recent_s, self._elapsed = recent_s, elapsed
        self._recent: deque[tuple[float, int]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._running: Future[Manifest] | None = None
        self._dropping: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a version is being published, or has not been settled yet."""
        return self._running is not None

    def offer(self, draft: Draft, served: content.Tensors, saving: Saving | None = None) -> None:
        """Starts to publish; the tensors must not change afterwards. Must not be called while busy.

        `served` are the changes since the previous version that serving needs. `saving` makes the version durable too.
        """
        if self.busy:
            raise RuntimeError("a version is still being published")
        self._running = self._thread.submit(self._publish, draft, served, saving)

    def save(self, first: Saving) -> None:
        """Starts to publish the first version of an epoch, which serving does not follow yet. Not while busy."""
        if self.busy:
            raise RuntimeError("a version is still being published")
        self._running = self._thread.submit(self._save, first, None)

    def settle(self, wait: bool = False) -> Manifest | None:
        """The version that was published since the last call, durable if it was to be; None if there is none.

        With `wait`, it waits for a version that is being published.

        Raises:
            WrongEpoch: It was refused, because control is at another epoch.
            UnusableRegistry: The disk refused the write; if it is full, only once waiting has ended.
        """
        running = self._running
        if running is None and self._is_old() and (self._dropping is None or self._dropping.done()):
            # Old recent versions are removed even if nothing is being published.
            self._dropping = self._thread.submit(self._drop_recent)
        if running is None or not (wait or running.done()):
            return None
        self._running = None
        return running.result()

    def close(self) -> None:
        """Stops the thread once the current version is published."""
        self._thread.shutdown(wait=True)

    def _publish(self, draft: Draft, served: content.Tensors, saving: Saving | None) -> Manifest:
        """Publishes a version, first as a recent one.

        Serving follows the recent version while it becomes durable, so it need not wait for the disk.
        """
        began, files = time.perf_counter(), content.encode_served(served)
        manifest = self._where_room_is(lambda: self._registry.publish(draft, files))
        self._metrics.publish_seconds.observe(time.perf_counter() - began)
        self._recent.append((self._elapsed(), manifest.version))
        if saving is not None:
            manifest = self._save(saving, manifest)
        self._drop_recent()
        return manifest

    def _save(self, saving: Saving, recent: Manifest | None) -> Manifest:
        began, files = time.perf_counter(), content.encode(saving.tensors)
        manifest = self._where_room_is(lambda: self._registry.publish(saving.draft, files, recent))
        self._metrics.save_seconds.observe(time.perf_counter() - began)
        self._metrics.durable_version.set(manifest.version)
        return manifest

    def _where_room_is(self, publish: Callable[[], Manifest]) -> Manifest:
        def drop_and_publish() -> Manifest:
            # Old recent versions may occupy the space that is missing.
            self._drop_recent()
            return publish()

        return publish() if self._room is None else self._room.wait_for(drop_and_publish, "publishing")

    def _is_old(self) -> bool:
        return len(self._recent) > 1 and self._elapsed() - self._recent[0][0] > self._recent_s

    def _drop_recent(self) -> None:
        while self._is_old():
            with suppress(UnusableRegistry):
                self._registry.remove("recent", self._recent.popleft()[1])
