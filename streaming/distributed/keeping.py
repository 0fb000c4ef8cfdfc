"""Keeps a bucket in an engine's state, and processes its portions: token, snapshot, deltas, and a cache in the process.

    head      the token, the bucket's positions, the sizes of snapshot and deltas
    snapshot  the store at some earlier time, in parts
    deltas    changes since then, one for each portion that changed the store

The cache is used only if its token equals that of the state. No token is used twice. So if the engine rolls a bundle
back, the token that the bundle left in the cache differs from that of the state.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from state.features.mask import Mask
from state.positions import Source
from streaming.distributed.bucket import BucketCore, BucketPlace, BucketRows, Joins
from streaming.distributed.bucket_store import BucketStore
from streaming.distributed.buckets import Portion
from streaming.distributed.delta import decode, encode

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
