"""One bucket of users: the stream's profiler and labels over an in-memory store, independent of Beam and any engine.

Its output for a portion depends on the log alone. So after an engine restores a bucket from a checkpoint, here or on
another machine, the bucket produces the same rows again. Readers drop them by their positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from state.config.settings import Settings
from state.errors import PositionConflict, SaltMismatch
from state.features.mask import Mask
from state.features.spec import Events, FeatureSpec
from state.history.read_times import ReadTimes
from state.history.sweeping import READ_TIMES, SPARE, STEPS
from state.history.waiting import place_of
from state.positions import Range, Source
from streaming.cut import Cut
from streaming.distributed.bucket_store import BucketStore
from streaming.distributed.buckets import Portion
from streaming.distributed.delta import Delta
from streaming.event_clock import clock_of_all
from streaming.labels import Labels, LookedUp
from streaming.profile import Profiler
from streaming.rows import Rows

SALT = "salt"  # name of the store's extra

Joins = Callable[[Rows], Rows]
"""Adds the attributes of users and items."""


class BucketPlace(NamedTuple):
    """The position of a bucket in a source.

    Attributes:
        next: The next offset.
        clock_ms: The event clock at that position, as readers were told, ms.
    """

    next: int
    clock_ms: int


@dataclass(frozen=True, slots=True, eq=False)
class BucketRows:
    """The output of a bucket for one portion.

    Attributes:
        rows: The rows to write; their ranges are the bucket's.
        mask_generation: Generation of the mask that windows were computed with.
        log_epoch: Epoch of the training log.
        dropped: Impressions that no longer wait because their user was erased or their topic is gone. They are ranges
            without positions, which come before those of the rows.
        users: Number of users with a history.
        appended_ms: Of the portion.
        bucket: Its number.
        erased: The last erasure that it has applied.
    """

    rows: Rows
    mask_generation: int = 0
    log_epoch: int = 1
    dropped: tuple[Range, ...] = ()
    users: int = 0
    appended_ms: int = 0
    bucket: int = 0
    erased: int = 0


class BucketCore:
    """The core objects of one bucket: profiler, labels, store and positions. Not thread-safe.

    Args:
        settings: The effective settings.
        spec: The feature spec.
        salt: Fingerprint of the salt of its users.
        store: Histories and waiting rows of the bucket.
        places: Its positions by source.
        erased: The last erasure that it has applied.

    Raises:
        SaltMismatch: The store was filled with another salt.
    """

    def __init__(
        self,
        settings: Settings,
        spec: FeatureSpec,
        salt: str,
        store: BucketStore,
        places: dict[Source, BucketPlace],
        erased: int = 0,
    ) -> None:
        self._settings, self._spec, self.store = settings, spec, store
        if (held := store.extra(SALT)) not in (None, salt.encode()):
            raise SaltMismatch.between("the job's state", (held or b"").decode(), salt)
        self._new: dict[str, bytes] = {**({SALT: salt.encode()} if held is None else {})}
        self._new |= store.name_actions(spec.actions)
        self.places, self.erased = places, erased
        stream, events = settings.stream, settings.events
        self._profiler = Profiler(store, spec, max(1, stream.cache_users // stream.buckets))
        self._reach_ms = 1000 * round(spec.windows_s[-1] + events.max_age_s + events.max_future_s)
        self._read = ReadTimes.from_json(store.extra(READ_TIMES))
        waits = settings.labels.impressions or store.waiting_rows()
        self._labels = Labels(settings, store) if waits else None

    @property
    def cached_users(self) -> int:
        """How many users' histories are cached in memory."""
        return self._profiler.cached_users

    def update(self, portion: Portion, mask: Mask, join: Joins) -> tuple[BucketRows, Delta]:
        """Computes the rows of a portion; the store includes them when it returns.

        Args:
            portion: Starts at the bucket's positions.
            mask: The clicks that no row may use.
            join: Adds the attributes of users and items.

        Returns:
            What to write, and what was added to the store.

        Raises:
            PositionConflict: The portion starts at another position.
            CorruptStore: The store lacks a waiting impression.
        """
        batch = portion.batch
        if len(batch):
            # Another source may not have applied an erasure yet. Its events are forgotten with the next portion of a
            # source that has.
            self.erased = min(self.erased, mask.erased.last)
        ended = self._of_topics_gone(batch.ranges)
        dropped = self._end_waits(ended)
        self._go_on(batch.ranges, portion.told.clocks)
        self._profiler.turn(mask)
        rows = join(replace(self._profiler.update(batch), told=portion.told))
        found = LookedUp([], {}, {})
        if self._labels is not None:
            found = self._labels.look_up([Cut((self._labels.attribute(rows),), 0)])
            ((rows,),) = (cut.pieces for cut in found.cuts)
        new, self._new = self._new, {}
        waiting = {**dict.fromkeys(ended), **found.waiting}
        delta = Delta(self.store.inwards(rows.appends), waiting, {**new, **found.extra, **self._marked()})
        self.store.take(delta)
        self._profiler.committed(rows)
        made = BucketRows(rows, mask.generation, portion.log_epoch, dropped, self.store.users, portion.appended_ms)
        return made, delta

    def forget(self, mask: Mask) -> tuple[Range, ...]:
        """Forgets users erased since the last call; returns the ranges of their impressions, which no longer wait.

        The deltas still contain their events, so a snapshot must be written.
        """
        gone = mask.erased.after(self.erased)
        self.store.forget(gone)
        # The caches and the queue are refilled from the store, which no longer contains these users.
        self._profiler.forget([*gone.users])
        self.erased = mask.erased.last
        return self._end_waits(self.store.waiting_of(gone))

    def sweep(self) -> None:
        """Removes events that no future row can use and, if there are too many users, those read longest ago."""
        marked_ms = self._read.newest_ms
        if marked_ms is None or not self.places:
            return
        clock_ms = self._clock_ms()
        horizon_ms = min(clock_ms, marked_ms) - self._reach_ms

        def is_old(events: Events) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
            old = events["at_ms"] <= horizon_ms
            return old & (self._read.at_latest(events, clock_ms) <= horizon_ms) if old.any() else old

        self.store.leave_old(is_old)
        stream = self._settings.stream
        most = -(-stream.max_users // stream.buckets)
        if self.store.users <= most:
            return
        users, newest = self.store.newest()
        order = np.argsort(self._read.about(newest, clock_ms), kind="stable")
        evicted = [users[at] for at in order[: len(users) - most + most // SPARE].tolist()]
        self.store.evict(evicted)
        self._profiler.forget(evicted)

    def _of_topics_gone(self, ranges: Sequence[Range]) -> list[bytes]:
        """The keys of rows that wait for outcomes of a topic that was replaced by a new one."""
        new = {part.source.topic_id for part in ranges if part.source not in self.places}
        if not new - {source.topic_id for source in self.places}:
            return []
        return [key for key, _ in self.store.waiting() if place_of(key)[0].topic_id not in new]

    def _end_waits(self, keys: Sequence[bytes]) -> tuple[Range, ...]:
        """Ends the wait of rows whose outcomes can no longer arrive; returns their count by source."""
        if not keys:
            return ()
        self.store.take(Delta(waiting=dict.fromkeys(keys)))
        self._labels = Labels(self._settings, self.store)
        at = {(one.topic_id, one.partition): (one, place.next) for one, place in self.places.items()}
        counted = Counter(at[source.topic_id, source.partition] for source, _ in map(place_of, keys))
        return tuple(Range(source, place, place, dropped=count) for (source, place), count in counted.items())

    def _go_on(self, ranges: Sequence[Range], clocks: Sequence[tuple[int, int]]) -> None:
        for part, (_, end_ms) in zip(ranges, clocks, strict=True):
            known = self.places.get(part.source)
            if known is not None and known.next != part.first:
                raise PositionConflict(
                    f"bucket {part.source.bucket} has {part.source} up to {known.next}, and what comes begins at {part.first}",
                    "the engine lost or repeated an element of this job: resume it from its last savepoint",
                )
            self.places[part.source] = BucketPlace(part.next, end_ms)

    def _clock_ms(self) -> int:
        return clock_of_all({source: place.clock_ms for source, place in self.places.items()}, self._reach_ms)

    def _marked(self) -> dict[str, bytes]:
        """Records positions and clock each time the log time has advanced by one step."""
        if not self.places:
            return {}
        clock_ms, marked_ms = self._clock_ms(), self._read.newest_ms
        if marked_ms is not None and abs(clock_ms - marked_ms) < self._reach_ms // STEPS:
            return {}
        positions = {source: place.next for source, place in self.places.items()}
        return {READ_TIMES: self._read.to_json()} if self._read.mark(positions, clock_ms, self._reach_ms) else {}
