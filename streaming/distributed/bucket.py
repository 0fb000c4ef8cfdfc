"""One bucket of users: the stream's profiler and labels over an in-memory store, kept in an engine's state.

`BucketCore` is independent of Beam and any engine. Its output for a portion depends on the log alone. So after an
engine restores a bucket from a checkpoint, here or on another machine, the bucket produces the same rows again. Readers
drop them by their positions. `take_portion` keeps it in the engine's state:

    head      the token, the bucket's positions, the sizes of snapshot and deltas
    snapshot  the store at some earlier time, in parts
    deltas    changes since then, one for each portion that changed the store

A cached bucket is used only if its token equals that of the state. No token is used twice. So if the engine rolls a
bundle back, the token that the bundle left in the cache differs from that of the state.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from state.config.settings import Settings
from state.errors import PositionConflict, SaltMismatch
from state.features.mask import Mask
from state.features.spec import FeatureSpec
from state.history.sweeping import READ_TIMES, SPARE, STEPS, ReadTimes
from state.history.waiting import place_of
from state.positions import Range, Source
from streaming.cut import Cut
from streaming.distributed.bucket_store import BucketStore, Delta, decode, encode
from streaming.distributed.buckets import Portion
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
        stream = settings.stream
        self._profiler = Profiler(store, spec, max(1, stream.cache_users // stream.buckets))
        self._reach_ms = spec.reach_ms(settings.events)
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
        waited = self.store.forget(gone)
        # The caches and the queue are refilled from the store, which no longer contains these users.
        self._profiler.forget([*gone.users])
        self.erased = mask.erased.last
        return self._end_waits(waited)

    def sweep(self) -> None:
        """Removes events that no future row can use and, if there are too many users, those read longest ago."""
        marked_ms = self._read.newest_ms
        if marked_ms is None or not self.places:
            return
        clock_ms = self._clock_ms()
        horizon_ms = min(clock_ms, marked_ms) - self._reach_ms
        self.store.leave_old(lambda events: self._read.are_old(events, horizon_ms, clock_ms))
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


LEAST_BYTES = 1_000_000  # of deltas, before a new snapshot is written
IDLE_S = 300.0  # a cached bucket without a portion for this long has moved to another process


class Cell(Protocol):
    """A single value in the state of a key."""

    def read(self) -> Any:
        """The value; None if there is none."""

    def write(self, value: bytes) -> None:
        """Replaces the value."""


class Bag(Protocol):
    """An unordered collection of values in the state of a key."""

    def read(self) -> Iterable[Any]:
        """All values."""
        ...

    def add(self, value: bytes) -> None:
        """Adds one value."""

    def clear(self) -> None:
        """Removes all values."""


@dataclass(frozen=True)
class Cells:
    """The state of one bucket in the engine."""

    head: Cell
    snapshot: Bag
    deltas: Bag


@dataclass
class Head:
    """The metadata of a bucket, read before its store.

    Attributes:
        token: Identifies exactly this state.
        places: The bucket's positions by source.
        number: Of the next delta.
        snapshot_bytes: Size of the snapshot.
        delta_bytes: Size of the deltas since the snapshot.
        erased: The last erasure that was applied.
    """

    token: str = ""
    places: dict[Source, BucketPlace] = field(default_factory=dict)
    number: int = 0
    snapshot_bytes: int = 0
    delta_bytes: int = 0
    erased: int = 0

    def to_bytes(self) -> bytes:
        """Encodes it for the engine's state."""
        values = {**vars(self), "places": {str(source): place for source, place in self.places.items()}}
        return json.dumps(values).encode()

    @classmethod
    def from_bytes(cls, value: bytes | None) -> Head:
        """Decodes the result of `to_bytes`; None stands for a bucket that never received a portion.

        >>> one = Head("ab", {Source("ab" * 16, 0, 1, 2): BucketPlace(7, 1000)}, 3)
        >>> Head.from_bytes(one.to_bytes()) == one
        True
        """
        if value is None:
            return cls()
        told = json.loads(value)
        places = {Source.parse(name): BucketPlace(*place) for name, place in told.pop("places").items()}
        return cls(places=places, **told)


class Cache:
    """The buckets in this process's memory. Thread-safe; a thread that has taken a bucket owns it exclusively.

    Args:
        clock: Monotonic clock in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._held: dict[int, tuple[str, BucketCore, float]] = {}
        self._lock = threading.Lock()

    def take(self, bucket: int, token: str) -> BucketCore | None:
        """Removes and returns the bucket if it is cached at `token`; otherwise None."""
        with self._lock:
            found = self._held.pop(bucket, None)
        return found[1] if found is not None and found[0] == token else None

    def keep(self, bucket: int, token: str, core: BucketCore) -> None:
        """Puts a bucket back, and drops buckets that were not used for `IDLE_S`."""
        now_s = self._clock()
        with self._lock:
            self._held[bucket] = (token, core, now_s)
            for other in [one for one, (_, _, used_s) in self._held.items() if now_s - used_s > IDLE_S]:
                del self._held[other]

    def clear(self) -> None:
        """Drops all buckets."""
        with self._lock:
            self._held.clear()

    @property
    def users(self) -> int:
        """Number of users whose histories are cached in memory."""
        with self._lock:
            return sum(core.cached_users for _, core, _ in self._held.values())


Opens = Callable[[BucketStore, dict[Source, BucketPlace], int], BucketCore]
"""Creates the core of a bucket from its store, its positions, and its last erasure."""


def take_portion(
    bucket: int,
    portion: Portion,
    cells: Cells,
    cache: Cache,
    opens: Opens,
    history: int,
    mask: Mask,
    join: Joins,
    new_token: Callable[[], str],
) -> BucketRows:
    """Computes the rows of a bucket's portion, and writes the bucket's change to the engine's state.

    1. Get the bucket from the cache or from the state.
    2. Forget users who were erased since.
    3. Compute the rows.
    4. Write the state: a delta or, if the deltas have become larger than the snapshot, a new snapshot.

    Args:
        bucket: Its number.
        portion: The portion to process.
        cells: The bucket's state in the engine.
        cache: Of this process.
        opens: Creates its core.
        history: N, the number of events kept for a user.
        mask: The mask of the portion's generation of control.
        join: Adds the attributes of users and items.
        new_token: Returns a token that was never used before.

    Raises:
        CorruptStore: The state cannot be read, or lacks a waiting impression.
        PositionConflict: The portion does not start at the bucket's positions.
        SaltMismatch: The state was written with another salt.
    """
    head = Head.from_bytes(cells.head.read())
    # 1.
    core = cache.take(bucket, head.token) if head.token else None
    if core is None:
        core = restored(cells, history, head, opens)
    # 2.
    erases = mask.erased.last > core.erased
    dropped = core.forget(mask) if erases else ()
    # 3.
    made, delta = core.update(portion, mask, join)
    # 4.
    size = 0
    if delta and not erases:
        value = encode(delta, head.number)
        size = len(value)
    if erases or head.delta_bytes + size > max(head.snapshot_bytes, LEAST_BYTES):
        core.sweep()
        head.snapshot_bytes, head.delta_bytes = write_snapshot(cells, core.store), 0
    elif size:
        cells.deltas.add(value)
        head.delta_bytes += size
        head.number += 1
    head.token, head.places, head.erased = new_token(), core.places, core.erased
    cells.head.write(head.to_bytes())
    cache.keep(bucket, head.token, core)
    return replace(made, bucket=bucket, erased=core.erased, dropped=(*dropped, *made.dropped))


def restored(cells: Cells, history: int, head: Head, opens: Opens) -> BucketCore:
    """Rebuilds a bucket from the engine's state.

    Raises:
        CorruptStore: A later release wrote it.
        SaltMismatch: It was written with another salt.
    """
    store = BucketStore(history)
    for values in (cells.snapshot.read(), cells.deltas.read()):
        for _, delta in sorted(map(decode, values), key=lambda one: one[0]):
            store.take(delta)
    return opens(store, head.places, head.erased)


def write_snapshot(cells: Cells, store: BucketStore) -> int:
    """Replaces snapshot and deltas by a new snapshot of the store; returns its size in bytes."""
    cells.snapshot.clear()
    cells.deltas.clear()
    size = 0
    for number, part in enumerate(store.snapshot()):
        value = encode(part, number)
        cells.snapshot.add(value)
        size += len(value)
    return size
