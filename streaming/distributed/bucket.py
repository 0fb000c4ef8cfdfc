"""One bucket of users: the stream's profiler and labels over an in-memory store, kept in an engine's state.

The output of `BucketCore` depends on the log alone. `Buckets.take` keeps a bucket in the engine's state:

    head      the token, the bucket's positions, the sizes of snapshot and deltas
    snapshot  the store at some earlier time, in parts
    deltas    changes since then, one for each portion that changed the store

A cached bucket is used only if its token equals that of the state. No token is used twice, so a bundle that the engine
rolled back leaves no usable bucket in the cache.

The events of a bundle are divided into buckets, and encoded to travel between steps or to stay in an engine.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from state.config.settings import Settings
from state.disk import documents
from state.errors import CorruptStore, PositionConflict, SaltMismatch
from state.events.parser import EventBatch
from state.features.erased import Erased
from state.features.mask import Mask
from state.features.spec import EVENT, Events, FeatureSpec
from state.history.appends import ACTIONS, Appends, Numbering, numbered
from state.history.sweeping import READ_TIMES, SPARE, STEPS, ReadTimes
from state.history.waiting import Changes, Extra, WaitingRows, place_of
from state.positions import Range, Source, share_of
from state.user_shares import SHARES
from streaming.event_clock import BatchClock, Moves, clock_of_all
from streaming.labels import Labels
from streaming.profile import Profiler
from streaming.rows import COLUMNS, Rows, merge_all

Value = TypeVar("Value")


def _as_values(array: object) -> tuple[str, Sequence[int], Any]:
    if not isinstance(array, np.ndarray):
        raise NotImplementedError(f"a {type(array).__name__} cannot be encoded")
    return array.dtype.str, array.shape, array.tobytes()


def _as_array(kind: object, values: Any) -> NDArray[Any]:
    name, shape, data = values
    return np.frombuffer(data, EVENT if name == EVENT.str else name).reshape(shape).copy()


_encoder = msgspec.msgpack.Encoder(enc_hook=_as_values)
_decoders: dict[object, msgspec.msgpack.Decoder[Any]] = {}


def encode(value: object) -> bytes:
    """Encodes dataclasses, tuples and dictionaries of numbers, texts and arrays."""
    return _encoder.encode(value)


def decode(data: bytes, kind: type[Value]) -> Value:
    """Decodes the result of `encode`; arrays are writable and contiguous, as compiled code requires.

    Raises:
        msgspec.ValidationError: The data is not of that type.
    """
    if kind not in _decoders:
        # Worker threads share this module.
        with documents.analysing:
            _decoders[kind] = msgspec.msgpack.Decoder(kind, dec_hook=_as_array)
    return cast(Value, _decoders[kind].decode(data))


def stored(state: Any, kind: type[Value]) -> Value:
    """Decodes a value of the engine's state; an empty one is `kind()`."""
    data = state.read()
    return kind() if data is None else decode(data, kind)


@dataclass(frozen=True, slots=True, eq=False)
class Portion:
    """The part of a bundle that one bucket receives.

    Attributes:
        batch: Its users' events; the ranges are the bucket's.
        clock: The event clock; `state` is empty, because it stays with the positions of the source.
        control: The generation of control whose mask left events out; 0 for none.
        log_epoch: The epoch of the training log that is written.
        appended_ms: When Kafka received the newest record of the bundle; 0 for none.
    """

    batch: EventBatch
    clock: BatchClock
    control: int = 0
    log_epoch: int = 1
    appended_ms: int = 0


def gathered(events: EventBatch) -> EventBatch:
    """Merges the ranges of several polls to one range for each partition."""
    if len({part.source for part in events.ranges}) == len(events.ranges):
        return events
    ranges = merge_all(events.ranges)
    number = {part.source: at for at, part in enumerate(ranges)}
    numbers = np.array([number[part.source] for part in events.ranges], np.uint16)
    return replace(events, ranges=ranges, source=numbers[events.source])


def divide(events: EventBatch, clock: BatchClock, buckets: int) -> list[tuple[EventBatch, BatchClock]]:
    """Divides a batch with one range for each partition; returns the parts in the order of the buckets.

    Dead letters go to the first bucket.
    """
    bucket_of, parts = share_of(events.user) % buckets, len(events.ranges)
    order = np.argsort(bucket_of, kind="stable")
    ends = np.cumsum(np.bincount(bucket_of, minlength=buckets)).tolist()
    rows = np.bincount(bucket_of * parts + events.source, minlength=buckets * parts).reshape(buckets, parts).tolist()
    categories, items = dict(events.names), dict(events.item_names)
    pieces = []
    for bucket, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        keep = order[start:end]
        columns = {name: column[keep] for name in COLUMNS if len(column := getattr(events, name)) == len(events)}
        batch = replace(
            events,
            **columns,
            ranges=tuple(
                _of_bucket(part, bucket, buckets, count)
                for part, count in zip(events.ranges, rows[bucket], strict=True)
            ),
            dead=() if bucket else events.dead,
            names=_named(categories, columns["category"]),
            item_names=_named(items, columns["item"]),
        )
        moves = _moves_at_turns(clock.moves, events.ranges, bucket, buckets)
        pieces.append((batch, BatchClock(clock.clock_ms[keep], moves, clock.believed, {}, () if bucket else clock.off)))
    # Names without an event go to the first bucket.
    first, first_clock = pieces[0]
    pieces[0] = replace(first, names=first.names | categories, item_names=first.item_names | items), first_clock
    return pieces


def _of_bucket(part: Range, bucket: int, buckets: int, rows: int) -> Range:
    """A bucket's range; offsets without a user are counted by the first bucket."""
    source = part.source._replace(bucket=bucket, buckets=buckets)
    if bucket:
        return Range(source, part.first, part.next, rows=rows, elsewhere=part.next - part.first - rows)
    return replace(part, source=source, rows=rows, elsewhere=part.rows - rows)


def _moves_at_turns(moves: Moves, ranges: Sequence[Range], bucket: int, buckets: int) -> Moves:
    """The clock moves at the turns of a bucket's shares, one at each `buckets`th offset; see `streaming.labels`."""
    ends = np.array([part.next for part in ranges], np.int64)[moves.source]
    offset = moves.offset + (bucket - moves.offset) % buckets
    was_read = offset < ends
    was_read[:-1] &= (offset[1:] != offset[:-1]) | (moves.source[1:] != moves.source[:-1])
    return Moves(moves.source[was_read], offset[was_read], moves.clock_ms[was_read])


def _named(names: dict[int, str], ids: NDArray[np.uint64]) -> dict[int, str]:
    return {key: names.pop(key) for key in names.keys() & {*ids.tolist()}} if names else {}


def allowed(buckets: int) -> bool:
    """Whether users can be divided into this many buckets, so that each of their shares belongs to one bucket.

    >>> [count for count in range(1, 100) if allowed(count)]
    [1, 2, 4, 8, 16, 32, 64]
    """
    return buckets >= 1 and SHARES % buckets == 0


SALT = "salt"  # name of the store's extra
FORMAT = 1
PART_BYTES = 900_000  # of one part of a snapshot; engines handle values of several megabytes badly
LEAST_BYTES = 1_000_000  # of deltas, before a new snapshot is written
IDLE_S = 300.0  # a cached bucket without a portion for this long has moved to another process
TOKEN_BYTES = 16
_EVENT_BYTES = EVENT.itemsize

Joins = Callable[[Rows], Rows]
"""Adds the attributes of users and items."""


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """One change to a bucket's store.

    Attributes:
        appends: New events by user.
        waiting: Rows that begin to wait, by key; None for a row whose wait ends.
        extra: Values of the owner to replace.
    """

    appends: Appends = field(default_factory=Appends.none)
    waiting: Mapping[bytes, bytes | None] = field(default_factory=dict)
    extra: Mapping[str, bytes] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(len(self.appends.events) or self.waiting or self.extra)


class BucketStore:
    """The in-memory store of one bucket: its users' histories and waiting rows. Not thread-safe.

    A snapshot has the form of deltas: it is the change to an empty store, in parts. Actions in its events are numbered
    by the names met so far, as in `state.history.store`. So the setting may change between a savepoint and the next
    job.
    """

    def __init__(self, history: int) -> None:
        self._history = history
        self._events: dict[int, bytes] = {}
        self._waiting: dict[bytes, bytes] = {}
        self._extra: dict[str, bytes] = {}
        self._numbering = Numbering()

    def name_actions(self, actions: Sequence[str]) -> dict[str, bytes]:
        """Numbers the actions of the settings; returns the extra values to store."""
        self._numbering, extra = numbered(self.extra(ACTIONS), actions)
        self._extra |= extra
        return extra

    @property
    def users(self) -> int:
        """How many users have a history."""
        return len(self._events)

    def read_many(self, users: Sequence[int]) -> list[Events]:
        """The histories of several users, each `[m <= N]` EVENT in append order."""
        events, outwards = self._events, self._numbering.outwards
        return [outwards(np.frombuffer(events.get(user, b""), EVENT)) for user in users]

    def extra(self, name: str) -> bytes | None:
        """See `HistoryStore.extra`."""
        return self._extra.get(name)

    def waiting(self) -> Iterator[tuple[bytes, bytes]]:
        """See `HistoryStore.waiting`."""
        return iter(sorted(self._waiting.items()))

    def waiting_values(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See `HistoryStore.waiting_values`."""
        return [self._waiting.get(key) for key in keys]

    def waiting_rows(self) -> int:
        """See `HistoryStore.waiting_rows`."""
        return len(self._waiting)

    def inwards(self, appends: Appends) -> Appends:
        """Converts appends to the store's numbering of actions."""
        events = self._numbering.inwards(appends.events)
        return appends if events is appends.events else replace(appends, events=events)

    def take(self, delta: Delta) -> None:
        """Applies a delta; its events are already numbered by `inwards`."""
        appends, most = delta.appends, self._history * _EVENT_BYTES
        data, events = appends.events.tobytes(), self._events
        starts, ends = (appends.starts * _EVENT_BYTES), (appends.starts + appends.lengths) * _EVENT_BYTES
        for user, start, end in zip(appends.users.tolist(), starts.tolist(), ends.tolist(), strict=True):
            before = events.get(user)
            events[user] = (data[start:end] if before is None else before + data[start:end])[-most:]
        for key, value in delta.waiting.items():
            if value is None:
                self._waiting.pop(key, None)
            else:
                self._waiting[key] = value
        self._extra |= delta.extra

    def leave_old(self, is_old: Callable[[Events], NDArray[np.bool_]]) -> int:
        """Removes the leading old events of each user; returns how many users have none left.

        It removes only leading events: a history keeps the last N events, and which ones these are must not change.
        """
        users, lengths = [*self._events], np.array([len(events) for events in self._events.values()], np.int64)
        if not users:
            return 0
        fresh = ~is_old(np.frombuffer(b"".join(self._events.values()), EVENT))
        ends = np.cumsum(lengths // _EVENT_BYTES)
        # For each index, the index of the first event at or after it that is not old.
        fresh_at = np.where(fresh, np.arange(len(fresh)), len(fresh))
        following = np.minimum.accumulate(fresh_at[::-1])[::-1]
        starts = ends - lengths // _EVENT_BYTES
        first_fresh = np.minimum(following[starts], ends)
        emptied = 0
        for number in np.flatnonzero(first_fresh > starts).tolist():
            user, remaining = users[number], int(ends[number] - first_fresh[number])
            if remaining:
                self._events[user] = self._events[user][-remaining * _EVENT_BYTES :]
            else:
                del self._events[user]
                emptied += 1
        return emptied

    def newest(self) -> tuple[list[int], Events]:
        """All users, and the newest event of each, `[k]` EVENT."""
        tails = b"".join(events[-_EVENT_BYTES:] for events in self._events.values())
        return [*self._events], np.frombuffer(tails, EVENT)

    def evict(self, users: Sequence[int]) -> None:
        """Removes users; they are then unknown, as before their first click."""
        for user in users:
            del self._events[user]

    def forget(self, erased: Erased) -> list[bytes]:
        """Removes the events and waiting rows of erased users; returns the keys of these rows."""
        for user in erased.users:
            if (stored := self._events.get(user)) is not None:
                events = np.frombuffer(stored, EVENT)
                remaining = events[~erased.events(events, user)]
                if len(remaining):
                    self._events[user] = remaining.tobytes()
                else:
                    del self._events[user]
        keys = WaitingRows(self).of_erased(erased)
        for key in keys:
            del self._waiting[key]
        return keys

    def snapshot(self) -> Iterator[Delta]:
        """Yields the whole content as deltas to an empty store, in parts of about `PART_BYTES`."""
        yield Delta(extra=dict(self._extra))
        for users in _parts(self._events):
            stored = [self._events[user] for user in users]
            lengths = np.array([len(events) // _EVENT_BYTES for events in stored], np.int64)
            events = np.frombuffer(b"".join(stored), EVENT)
            yield Delta(Appends(np.array(users, np.uint64), np.cumsum(lengths) - lengths, lengths, events))
        for keys in _parts(self._waiting):
            yield Delta(waiting={key: self._waiting[key] for key in keys})


def _parts(values: Mapping[Any, bytes]) -> Iterator[list[Any]]:
    """The keys in groups whose values have about `PART_BYTES` together."""
    keys: list[Any] = []
    size = 0
    for key, value in values.items():
        keys.append(key)
        size += len(value)
        if size >= PART_BYTES:
            yield keys
            keys, size = [], 0
    if keys:
        yield keys


class BucketPlace(NamedTuple):
    """The next offset of a bucket in a source, and the time that readers may believe there, ms."""

    next: int
    clock_ms: int


@dataclass(frozen=True, slots=True, eq=False)
class BucketRows:
    """The output of a bucket for one portion.

    Attributes:
        rows: The rows to write; their ranges are the bucket's.
        dropped: Impressions that no longer wait because their user was erased or their topic is gone. They are ranges
            without positions, which come before those of the rows.
        users: Number of users with a history.
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
        positions: dict[Source, BucketPlace],
        erased: int = 0,
    ) -> None:
        self._settings, self._spec, self.store = settings, spec, store
        stored_salt = store.extra(SALT)
        if stored_salt not in (None, salt.encode()):
            raise SaltMismatch.between("the job's state", (stored_salt or b"").decode(), salt)
        self._new: Extra = {SALT: salt.encode()} if stored_salt is None else {}
        self._new |= store.name_actions(spec.actions)
        self.places, self.erased = positions, erased
        stream = settings.stream
        self._profiler = Profiler(store, spec, max(1, stream.cache_users // stream.buckets))
        self._reach_ms = spec.reach_ms(settings.events)
        self._read = ReadTimes.from_json(store.extra(READ_TIMES))
        waits = settings.labels.impressions or store.waiting_rows()
        self._labels = Labels(settings, store) if waits else None

    def update(self, portion: Portion, mask: Mask, join: Joins) -> tuple[BucketRows, Delta]:
        """Computes the rows of a portion; returns them and the change to the store, which is already applied.

        Raises:
            PositionConflict: The portion does not start at the bucket's positions.
            CorruptStore: The store lacks a waiting impression.
        """
        batch = portion.batch
        if len(batch):
            # Another source may not have applied an erasure yet. Its events are forgotten with the next portion of a
            # source that has.
            self.erased = min(self.erased, mask.erased.last)
        ended = self._waits_of_old_topics(batch.ranges)
        dropped = self._end_waits(ended)
        self._advance(batch.ranges, portion.clock.believed)
        self._profiler.set_mask(mask)
        rows = join(replace(self._profiler.update(batch), clock=portion.clock))
        waiting: Changes = dict.fromkeys(ended)
        extra, self._new = self._new, {}
        if self._labels is not None:
            rows = self._labels.complete(self._labels.attribute(rows), waiting, extra)
        delta = Delta(self.store.inwards(rows.appends), waiting, {**extra, **self._marked()})
        self.store.take(delta)
        self._profiler.committed(rows)
        computed = BucketRows(rows, mask.generation, portion.log_epoch, dropped, self.store.users, portion.appended_ms)
        return computed, delta

    def forget(self, mask: Mask) -> tuple[Range, ...]:
        """Forgets users erased since the last call; returns the ranges of their impressions, which no longer wait.

        The deltas still contain their events, so a snapshot must be written.
        """
        newly_erased = mask.erased.after(self.erased)
        waited = self.store.forget(newly_erased)
        # The caches and the queue are refilled from the store, which no longer contains these users.
        self._profiler.forget([*newly_erased.users])
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
        most = -(-self._settings.history.max_users // self._settings.stream.buckets)
        if self.store.users <= most:
            return
        users, newest = self.store.newest()
        order = np.argsort(self._read.about(newest, clock_ms), kind="stable")
        evicted = [users[at] for at in order[: len(users) - most + most // SPARE].tolist()]
        self.store.evict(evicted)
        self._profiler.forget(evicted)

    def _waits_of_old_topics(self, ranges: Sequence[Range]) -> list[bytes]:
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
        at = {(source.topic_id, source.partition): (source, position.next) for source, position in self.places.items()}
        counted = Counter(at[source.topic_id, source.partition] for source, _ in map(place_of, keys))
        return tuple(Range(source, offset, offset, dropped=count) for (source, offset), count in counted.items())

    def _advance(self, ranges: Sequence[Range], clocks: Sequence[tuple[int, int]]) -> None:
        for part, (_, end_ms) in zip(ranges, clocks, strict=True):
            position = self.places.get(part.source)
            if position is not None and position.next != part.first:
                raise PositionConflict(
                    f"bucket {part.source.bucket} has {part.source} up to {position.next}, and the next portion begins at {part.first}",
                    "the engine lost or repeated an element of this job: resume it from its last savepoint",
                )
            self.places[part.source] = BucketPlace(part.next, end_ms)

    def _clock_ms(self) -> int:
        return clock_of_all({source: position.clock_ms for source, position in self.places.items()}, self._reach_ms)

    def _marked(self) -> dict[str, bytes]:
        """Records positions and clock whenever the log time has advanced by one step."""
        if not self.places:
            return {}
        clock_ms, marked_ms = self._clock_ms(), self._read.newest_ms
        if marked_ms is not None and abs(clock_ms - marked_ms) < self._reach_ms // STEPS:
            return {}
        positions = {source: position.next for source, position in self.places.items()}
        return {READ_TIMES: self._read.to_json()} if self._read.mark(positions, clock_ms, self._reach_ms) else {}


@dataclass(frozen=True)
class Cells:
    """The state of one bucket in the engine: a value, and two bags whose values are in no order."""

    head: Any
    snapshot: Any
    deltas: Any


@dataclass
class Head:
    """The metadata of a bucket, read before its store.

    Attributes:
        token: Identifies exactly this state; empty before the first portion.
        places: The bucket's positions by source.
        number: Of the next delta.
        erased: The last erasure that was applied.
    """

    token: str = ""
    places: dict[Source, BucketPlace] = field(default_factory=dict)
    number: int = 0
    snapshot_bytes: int = 0
    delta_bytes: int = 0
    erased: int = 0


Opens = Callable[[BucketStore, dict[Source, BucketPlace], int], BucketCore]
"""Creates the core of a bucket from its store, its positions, and its last erasure."""


class Buckets:
    """The buckets that this process computes, cached in memory. Thread-safe; one thread at a time uses a bucket."""

    def __init__(self, opens: Opens, history: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._opens, self._history, self._clock = opens, history, clock
        self._cached: dict[int, tuple[str, BucketCore, float]] = {}
        self._lock = threading.Lock()

    def take(self, bucket: int, portion: Portion, cells: Cells, mask: Mask, join: Joins) -> BucketRows:
        """Computes the rows of a bucket's portion, and writes the bucket's change to the engine's state.

        1. Get the bucket from the cache or from the state.
        2. Forget users who were erased since.
        3. Compute the rows.
        4. Write the state: a delta or, if the deltas have become larger than the snapshot, a new snapshot.

        Raises:
            CorruptStore: The state cannot be read, or lacks a waiting impression.
            PositionConflict: The portion does not start at the bucket's positions.
            SaltMismatch: The state was written with another salt.
        """
        head = stored(cells.head, Head)
        # 1.
        core = self._from_cache(bucket, head.token)
        if core is None:
            core = self._opens(restored(cells, self._history), head.places, head.erased)
        # 2.
        erases = mask.erased.last > core.erased
        dropped = core.forget(mask) if erases else ()
        # 3.
        computed, delta = core.update(portion, mask, join)
        # 4.
        value = encode((FORMAT, head.number, delta)) if delta and not erases else b""
        if erases or head.delta_bytes + len(value) > max(head.snapshot_bytes, LEAST_BYTES):
            core.sweep()
            head.snapshot_bytes, head.delta_bytes = _write_snapshot(cells, core.store), 0
        elif value:
            cells.deltas.add(value)
            head.delta_bytes += len(value)
            head.number += 1
        head.token, head.places, head.erased = secrets.token_hex(TOKEN_BYTES), core.places, core.erased
        cells.head.write(encode(head))
        self._keep(bucket, head.token, core)
        return replace(computed, bucket=bucket, erased=core.erased, dropped=(*dropped, *computed.dropped))

    def clear(self) -> None:
        """Drops all cached buckets."""
        with self._lock:
            self._cached.clear()

    def _from_cache(self, bucket: int, token: str) -> BucketCore | None:
        """Removes and returns the bucket if it is cached at `token`."""
        with self._lock:
            cached = self._cached.pop(bucket, None)
        return cached[1] if cached is not None and cached[0] == token else None

    def _keep(self, bucket: int, token: str, core: BucketCore) -> None:
        now_s = self._clock()
        with self._lock:
            self._cached[bucket] = (token, core, now_s)
            for other in [key for key, (_, _, used_s) in self._cached.items() if now_s - used_s > IDLE_S]:
                del self._cached[other]


def restored(cells: Cells, history: int) -> BucketStore:
    """Rebuilds a bucket's store from the engine's state.

    Raises:
        CorruptStore: Another release wrote it.
    """
    store = BucketStore(history)
    for values in (cells.snapshot.read(), cells.deltas.read()):
        # An engine may return the values in another order.
        for _, delta in sorted(map(_decode_delta, values), key=lambda numbered: numbered[0]):
            store.take(delta)
    return store


def _decode_delta(value: bytes) -> tuple[int, Delta]:
    try:
        version, number, delta = decode(value, tuple[int, int, Delta])
    except msgspec.ValidationError:
        version = 0
    if version != FORMAT:
        raise CorruptStore(
            f"the state of a bucket has another format than {FORMAT}, which this release reads",
            "resume the job with the release that wrote its savepoint",
        )
    return number, delta


def _write_snapshot(cells: Cells, store: BucketStore) -> int:
    cells.snapshot.clear()
    cells.deltas.clear()
    values = [encode((FORMAT, number, part)) for number, part in enumerate(store.snapshot())]
    for value in values:
        cells.snapshot.add(value)
    return sum(map(len, values))
