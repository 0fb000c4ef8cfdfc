"""Snapshots of a host's histories: writes them while clicks are applied, and loads one into a store that has none."""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from deploy.serving.following.clicks import SALT_EXTRA, is_remembered, position_of
from deploy.serving.following.parity import WHOLE_EXTRA
from deploy.serving.host_files import CAUGHT_UP_EXTRA, name_of
from state.config.settings import Settings
from state.errors import CorruptStore, StoreFull, UnusablePlace
from state.history import snapshots
from state.history.appends import Appends
from state.history.rewinding import branch_of
from state.history.snapshots import MOST_GAINED, Cut, Gained, HistorySnapshot, SnapshotWriter, Wanted
from state.history.store import HistoryStore
from state.log import Log
from state.log.follow import Position
from state.metrics import ApplierMetrics
from state.process.log_lines import SaidOnce
from state.registry.log_line import LogLine

FULL_INTERVALS = 30
"""After a snapshot that was too large, the next one is tried after this many intervals."""
STANDBY = 3
"""Another host takes over after this many intervals without a snapshot."""
CHECKED_MS = 6 * 3_600_000
"""The time in which the writer reads each file of its snapshots once, to find damage."""
POLL_S, LOOK_MS = 0.2, 10_000
FAR_CLICKS, FAR_SHARE = 1_000_000, 8
"""A snapshot replaces histories that lack more clicks than `FAR_CLICKS`, and than its events divided by `FAR_SHARE`."""
_log = logging.getLogger(__name__)


class SnapshotTaker:
    """Writes snapshots of one host's histories.

    The thread that writes the histories calls `take`, `start_over` and `poll`. Another one runs `run`.

    Args:
        settings: The effective settings.
        store: The histories.
        metrics: Metrics of this process.
        stop: Ends `run`.
        now_ms: Wall clock.

    Attributes:
        reading: Whether a view of the store is open; it must not be compacted then.
    """

    def __init__(
        self,
        settings: Settings,
        store: HistoryStore,
        metrics: ApplierMetrics,
        stop: threading.Event,
        now_ms: Callable[[], int],
    ) -> None:
        self._store, self._metrics, self._stop, self._now_ms = store, metrics, stop, now_ms
        self._every_ms = round(1000 * settings.history.snapshot_every_s)
        self._name = name_of(settings.serving_dir)
        self._location = snapshots.location_of(settings)
        most = snapshots.most_bytes(settings)
        self._writer = SnapshotWriter(self._location, self._name, store.history, store.shares, most, stop.is_set)
        self._lock = threading.Lock()
        # All events since `_last`, the newest snapshot, if `_complete`; else the next cut finds them.
        self._gained, self._events, self._complete = list[Gained](), 0, False
        self._last: HistorySnapshot | None = None
        self._restarts, self._is_due, self._look_ms, self._checked = 0, False, 0, ""
        # Read here, since the store may be closed and opened again by its own thread.
        self._erased = store.forgotten.through
        self._asked, self._cuts = threading.Event(), queue.SimpleQueue[tuple[Cut, int, int]]()
        self.reading = False
        metrics.snapshot_seconds.set(now_ms() / 1000)

    def take(self, appends: Appends) -> None:
        """Keeps the events of a commit for the next snapshot."""
        if not self._complete or not len(appends.users):
            return
        users, events = np.repeat(appends.users, appends.lengths), self._store.numbering.inwards(appends.events)
        if not self._store.shares.is_all:
            is_ours = self._store.shares.has(users)
            users, events = users[is_ours], events[is_ours]
        with self._lock:
            self._gained.append(Gained(users, events))
            self._events += len(events)
            if self._events > MOST_GAINED:
                self._forget()

    def start_over(self) -> None:
        """Makes a snapshot due now, after histories lost events by a rollback or an erasure."""
        with self._lock:
            self._forget()
            self._restarts += 1
            self._is_due, self._look_ms, self._erased = True, 0, self._store.forgotten.through

    def _forget(self) -> None:
        self._gained, self._events, self._complete = [], 0, False

    def poll(self, caught_up: bool) -> None:
        """Makes a cut if one is due, between two commits; histories that have not caught up are not written."""
        if not (caught_up and self._asked.is_set()):
            return
        position, salt = position_of(self._store), self._store.extra(SALT_EXTRA)
        if position is None or salt is None:
            return
        self._asked.clear()
        self.reading = True
        with self._lock:
            since, parts = self._last, list(self._gained) if self._complete else None
            if parts is None:
                self._forget()
                self._complete = True
                since = since if since is not None and self._continues(since, position, salt.decode()) else None
            cut = Cut(self._store.view(), position, salt.decode(), parts, since)
            self._cuts.put((cut, len(parts or ()), self._restarts))

    def _continues(self, since: HistorySnapshot, position: Position, salt: str) -> bool:
        """Whether the histories are those of a snapshot and the events after it."""
        store, ends = self._store, {partition: (0, after) for partition, after in position.next.items()}
        wanted = Wanted(store.history, salt, branch_of(store), position.topic_id, ends, store.shares)
        return since.erased == store.forgotten.through and not wanted.refuse(since)

    def run(self) -> None:
        """Writes snapshots until `stop`."""
        say = SaidOnce(_log.warning)
        try:
            while not self._stop.wait(POLL_S):
                now_ms = self._now_ms()
                # Do not wait for a clock that was set back.
                if 0 < self._look_ms - now_ms <= FULL_INTERVALS * self._every_ms:
                    continue
                self._look_ms = now_ms + min(LOOK_MS, self._every_ms)
                try:
                    self._look(now_ms)
                    say.clear()
                except UnusablePlace as error:
                    say(f"no snapshot of the histories is written: {error}")
                except StoreFull as error:
                    self._look_ms = now_ms + FULL_INTERVALS * self._every_ms
                    say(f"no snapshot of the histories is written: {error}")
        finally:
            while not self._cuts.empty():
                self._cuts.get()[0].view.close()

    def _look(self, now_ms: int) -> None:
        newest = self._last
        if newest is None or snapshots.numbers(self._location)[-1:] != [newest.number]:
            newest = snapshots.newest(self._location, self._store.shares)
        if newest is not None:
            self._metrics.snapshot_seconds.set(newest.created_at_ms / 1000)
        if not self._due(newest, now_ms):
            return
        if newest is None or self._last is None or newest.number != self._last.number:
            with self._lock:
                self._forget()
                self._last = newest
        self._asked.set()
        cut = None
        while cut is None and not self._stop.is_set():
            with suppress(queue.Empty):
                cut = self._cuts.get(timeout=POLL_S)
        if cut is not None:
            self._write(*cut, after=newest.number if newest else 0)

    def _due(self, newest: HistorySnapshot | None, now_ms: int) -> bool:
        if newest is None:
            return True
        own = newest.writer == self._name
        if own and (self._is_due or newest.erased < self._erased):
            return True
        age_ms = now_ms - newest.created_at_ms
        return age_ms >= self._every_ms * (1 if own else STANDBY) or age_ms < 0

    def _write(self, cut: Cut, parts: int, restarts: int, after: int) -> None:
        snapshot = None
        try:
            snapshot = self._writer.write(cut, self._now_ms(), after)
        finally:
            self.reading = False
            with self._lock:
                if restarts == self._restarts:
                    self._written(snapshot, cut, parts)
        if snapshot is not None:
            self._metrics.snapshot_seconds.set(snapshot.created_at_ms / 1000)
            new = sum(file.bytes for file in snapshot.files if file.number == snapshot.number)
            _log.info(
                "snapshot %d of the histories of %d users: %.1f MB, of which %.1f MB are new",
                *(snapshot.number, snapshot.users, snapshot.bytes / 1e6, new / 1e6),
            )
            self._check(snapshot)

    def _check(self, snapshot: HistorySnapshot) -> None:
        """Reads the next files, in the order of their names; damage removes the snapshots that have it."""
        files = sorted(snapshot.files, key=lambda file: (file.name <= self._checked, file.name))
        for file in files[: math.ceil(len(files) * self._every_ms / CHECKED_MS)]:
            if self._stop.is_set():
                return
            self._checked = file.name
            try:
                snapshots.read_file(self._location, file)
            except CorruptStore as error:
                _log.error("snapshot %d of histories is damaged and not used: %s", snapshot.number, error)

    def _written(self, snapshot: HistorySnapshot | None, cut: Cut, parts: int) -> None:
        if snapshot is not None:
            self._last, self._is_due = snapshot, False
            del self._gained[:parts]
            self._events = sum(len(part.users) for part in self._gained)
        elif cut.gained is None:
            self._forget()


def load_if_behind(settings: Settings, store: HistoryStore, salt: str | None, branch: LogLine, log: Log) -> bool:
    """Loads the newest snapshot that can be used into histories that are empty or far behind it.

    Returns whether the histories have changed. If the store is too small for the snapshot, they are empty. If none can
    be used, empty histories get the names and the items of the newest one: the stream repeats a name only every ten
    minutes of event time, and the training log may have lost the last record with it.

    Raises:
        LogError: The training log cannot be described.
        UnusablePlace: The location of the registry cannot be reached. The store is unchanged, or marked as loading.
        StoreFull: The disk is full.
    """
    location = snapshots.location_of(settings)
    if not snapshots.numbers(location):
        return False
    with log.topics() as topics:
        topic = settings.kafka.microbatches_topic
        topic_id, ends = topics.describe(topic).topic_id, topics.ends(topic)
    wanted = Wanted(store.history, salt, branch, topic_id, ends, store.shares)
    if not store.is_loading and (positions := store.positions()):
        snapshot = next(snapshots.usable(location, wanted), None)
        if snapshot is None:
            return False
        ahead = sum(max(0, after - positions.get(source, 0)) for source, after in snapshot.marks.items())
        if ahead <= max(FAR_CLICKS, sum(part.events for part in snapshot.ranges) // FAR_SHARE):
            return False
    try:
        loaded = snapshots.load_newest(location, wanted, store, keep=lambda name: name != CAUGHT_UP_EXTRA)
    except StoreFull as error:
        _log.error("no snapshot of histories is used, they are read from the training log: %s", error)
        store.clear()
        store.finish_loading([], 0)
        return True
    if loaded is None and not store.positions():
        store.commit(Appends.none(), extra=snapshots.newest_extras(location, wanted, is_remembered))
    if loaded is not None:
        if store.extra(WHOLE_EXTRA) is None:
            # The host that wrote the snapshot had lost no events.
            store.commit(Appends.none(), extra={WHOLE_EXTRA: b"0"})
        _log.info("the histories of %d users are from snapshot %d", loaded.users, loaded.number)
    return loaded is not None
