"""Publishes versions in the background while the step thread continues: recent ones, and next to them durable ones."""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent import futures
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
    """Encodes, digests and syncs versions. The step thread calls every method.

    One thread publishes recent versions. When one of them is to be durable, a second thread stores it, which takes
    several times as long; further recent versions follow meanwhile.

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
        self._registry = Registry(registry.path, registry.directory.claim)
        self._metrics = metrics
        self._recent_s, self._elapsed = recent_s, elapsed
        self._recent: deque[tuple[float, int]] = deque()
        self._dropping: Future[None] | None = None
        self._drop_lock = threading.Lock()
        # Each thread waits on its own for space.
        self._publishing, self._saving = _Writing("publish", room), _Writing("save", copy.copy(room))

    @property
    def accepts(self) -> bool:
        """Whether a version may be offered: the previous one can be followed, and was settled."""
        return self._publishing.running is None

    @property
    def saves(self) -> bool:
        """Whether a version is becoming durable, or has not been settled yet."""
        return self._saving.running is not None

    @property
    def busy(self) -> bool:
        """Whether any version is being written, or has not been settled yet."""
        return self.saves or not self.accepts

    def offer(self, draft: Draft, served: content.Tensors, saving: Saving | None = None) -> None:
        """Starts to publish; the tensors must not change afterwards. Only if it `accepts` a version.

        `served` are the changes since the previous version that serving needs. `saving` makes the version durable too;
        not while another one `saves`.
        """
        if not self.accepts or (saving is not None and self.saves):
            raise RuntimeError("a version is still being published")
        recent = self._publishing.start(lambda: self._publish(draft, served))
        if saving is not None:
            self._saving.start(lambda: self._save(saving, recent.result()))

    def save(self, first: Saving) -> None:
        """Starts to publish the first version of an epoch, which serving does not follow yet. Not while busy."""
        if self.busy:
            raise RuntimeError("a version is still being published")
        self._saving.start(lambda: self._save(first, None))

    def settle(self, wait: bool = False) -> list[Manifest]:
        """The versions that were written since the last call: at most a recent one, then at most a durable one.

        With `wait`, it waits for those that are being written.

        Raises:
            WrongEpoch: One was refused, because control is at another epoch.
            UnusableRegistry: The disk refused the write; if it is full, only once waiting has ended.
        """
        if self.accepts and self._is_old() and (self._dropping is None or self._dropping.done()):
            # Old recent versions are removed even if nothing is being published.
            self._dropping = self._publishing.thread.submit(self._drop_recent)
        # Both are settled before either raises.
        ended = [*self._publishing.ended(wait), *self._saving.ended(wait)]
        return [written.result() for written in ended]

    def close(self) -> None:
        """Stops the threads once the current versions are written."""
        self._publishing.thread.shutdown(wait=True)
        self._saving.thread.shutdown(wait=True)

    def _publish(self, draft: Draft, served: content.Tensors) -> Manifest:
        """Publishes a recent version. Serving follows it while it becomes durable, so it need not wait for the disk."""
        began, files = time.perf_counter(), content.encode_served(served)
        manifest = self._where_room_is(self._publishing.room, lambda: self._registry.publish(draft, files))
        self._metrics.publish_seconds.observe(time.perf_counter() - began)
        self._recent.append((self._elapsed(), manifest.version))
        self._drop_recent()
        return manifest

    def _save(self, saving: Saving, recent: Manifest | None) -> Manifest:
        began, files = time.perf_counter(), content.encode(saving.tensors)
        manifest = self._where_room_is(self._saving.room, lambda: self._registry.publish(saving.draft, files, recent))
        self._metrics.save_seconds.observe(time.perf_counter() - began)
        self._metrics.durable_version.set(manifest.version)
        return manifest

    def _where_room_is(self, room: Room | None, publish: Callable[[], Manifest]) -> Manifest:
        def drop_and_publish() -> Manifest:
            # Old recent versions may occupy the space that is missing.
            self._drop_recent()
            return publish()

        return publish() if room is None else room.wait_for(drop_and_publish, "publishing")

    def _is_old(self) -> bool:
        return len(self._recent) > 1 and self._elapsed() - self._recent[0][0] > self._recent_s

    def _drop_recent(self) -> None:
        with self._drop_lock:
            while self._is_old():
                with suppress(UnusableRegistry):
                    self._registry.remove("recent", self._recent.popleft()[1])


class _Writing:
    """A thread that writes one version at a time."""

    def __init__(self, name: str, room: Room | None) -> None:
        self.thread, self.room = ThreadPoolExecutor(1, thread_name_prefix=name), room
        self.running: Future[Manifest] | None = None

    def start(self, write: Callable[[], Manifest]) -> Future[Manifest]:
        self.running = self.thread.submit(write)
        return self.running

    def ended(self, wait: bool) -> list[Future[Manifest]]:
        """The write once it has ended, and only once; with `wait`, after waiting for it."""
        running = self.running
        if running is None or not (wait or running.done()):
            return []
        futures.wait([running])
        self.running = None
        return [running]
