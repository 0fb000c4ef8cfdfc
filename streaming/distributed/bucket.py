"""One bucket of users: the stream's own profiler and labels over a store in memory; it knows neither Beam nor an engine.

What it makes of a portion depends on the log alone. So a bucket that an engine
takes back to a checkpoint, here or on another machine, makes the same rows
again, and readers drop them by their places.
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
"""Adds what is known of users and items."""


class BucketPlace(NamedTuple):
    """How far a bucket is in a source.

    Attributes:
        next: The next offset.
        clock_ms: What time readers were told it was there.
    """

    next: int
    clock_ms: int


@dataclass(frozen=True, slots=True, eq=False)
class BucketRows:
    """What a bucket made of a portion.

    Attributes:
        rows: To be written; their ranges are the bucket's.
        mask_generation: Of the mask under which windows were computed.
        log_epoch: Of the training log.
        dropped: Impressions of erased users, or of a topic that is gone, which wait no more: ranges without positions,
            which come before those of the rows.
        users: With a history.
        appended_ms: Of the portion.
        bucket: Its number.
        erased: The last erasure that it has taken into account.
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
    """The cores of one bucket. One thread at a time uses it.

    Args:
        settings: The effective settings.
        spec: The feature spec.
        salt: Fingerprint of the salt of its users.
        store: What the bucket has.
        places: How far it is.
        erased: The last erasure that it has taken into account.

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
        """How many users' rings are in memory."""
        return self._profiler.cached_users

    def update(self, portion: Portion, mask: Mask, join: Joins) -> tuple[BucketRows, Delta]:
        """Makes the rows of a portion; the store has them when it returns.

        Args:
            portion: Goes on where the bucket is.
            mask: The clicks that no row may use.
            join: Adds what is known of users and items.

        Returns:
            What to write, and what the store has gained.

        Raises:
            PositionConflict: It begins elsewhere.
            CorruptStore: The store lacks an impression that waits.
        """
        batch = portion.batch
        if len(batch):
            # Another source may not have heard of an erasure yet: what it brings is forgotten with the next portion
            # of one that has.
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
        """Forgets users who were erased since; returns what of theirs waits no more.

        The deltas have their events still: a snapshot is to be written.
        """
        gone = mask.erased.after(self.erased)
        self.store.forget(gone)
        # Rings and queue are filled from the store, which has nothing of them any more.
        self._profiler.forget([*gone.users])
        self.erased = mask.erased.last
        return self._end_waits(self.store.waiting_of(gone))

    def sweep(self) -> None:
        """Takes away what no row that still comes can see, and where there are too many users, those read longest ago."""
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
        """The keys of rows that wait for outcomes of a topic in whose place there is another one now."""
        new = {part.source.topic_id for part in ranges if part.source not in self.places}
        if not new - {source.topic_id for source in self.places}:
            return []
        return [key for key, _ in self.store.waiting() if place_of(key)[0].topic_id not in new]

    def _end_waits(self, keys: Sequence[bytes]) -> tuple[Range, ...]:
        """Ends the wait of rows whose outcomes cannot come any more; returns by source how many these are."""
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
        """Notes how far the bucket was read at what time, each time log time has gone on by a step."""
        if not self.places:
            return {}
        clock_ms, marked_ms = self._clock_ms(), self._read.newest_ms
        if marked_ms is not None and abs(clock_ms - marked_ms) < self._reach_ms // STEPS:
            return {}
        positions = {source: place.next for source, place in self.places.items()}
        return {READ_TIMES: self._read.to_json()} if self._read.mark(positions, clock_ms, self._reach_ms) else {}
