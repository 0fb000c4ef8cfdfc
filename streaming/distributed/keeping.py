"""How a bucket lies in an engine's state, and a portion is taken: token, snapshot, deltas, and a cache in the process.

    head      the token, how far the bucket is, how large snapshot and deltas are
    snapshot  the store in parts, as of some moment
    deltas    what it gained since then, one of each portion that changed it

The cache is used only where its token is that of the state. Tokens are never
given twice: what a bundle left in the cache that the engine then took back has
another one than the state, whatever became of the bundle since.
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

LEAST_BYTES = 1_000_000  # of deltas, before a snapshot is written anew
IDLE_S = 300.0  # a bucket that this process had for so long without a portion is somewhere else


class Cell(Protocol):
    """One value of the state of a key."""

    def read(self) -> Any:
        """The value; None where there is none."""

    def write(self, value: bytes) -> None:
        """Replaces it."""


class Bag(Protocol):
    """Values of the state of a key, in no order."""

    def read(self) -> Iterable[Any]:
        """All of them."""
        ...

    def add(self, value: bytes) -> None:
        """Adds one."""

    def clear(self) -> None:
        """Takes all away."""


@dataclass(frozen=True)
class Cells:
    """The state of one bucket, as the engine keeps it."""

    head: Cell
    snapshot: Bag
    deltas: Bag


@dataclass
class Head:
    """What is known of a bucket before its store is read.

    Attributes:
        token: Of this very state.
        places: How far the bucket is.
        number: Of the next delta.
        snapshot_bytes: Of the snapshot.
        delta_bytes: Of the deltas since.
        erased: The last erasure taken into account.
    """

    token: str = ""
    places: dict[Source, BucketPlace] = field(default_factory=dict)
    number: int = 0
    snapshot_bytes: int = 0
    delta_bytes: int = 0
    erased: int = 0

    def to_bytes(self) -> bytes:
        """As the state keeps it."""
        values = {**vars(self), "places": {str(source): place for source, place in self.places.items()}}
        return json.dumps(values).encode()

    @classmethod
    def from_bytes(cls, value: bytes | None) -> Head:
        """What `to_bytes` gave; None is a bucket that never got anything.

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
    """The buckets in this process's memory. Any thread may use it; whoever has taken a bucket has it alone.

    Args:
        clock: Seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._held: dict[int, tuple[str, BucketCore, float]] = {}
        self._lock = threading.Lock()

    def take(self, bucket: int, token: str) -> BucketCore | None:
        """The bucket as it is at `token`, which nobody else gets then; None where it is not here."""
        with self._lock:
            found = self._held.pop(bucket, None)
        return found[1] if found is not None and found[0] == token else None

    def keep(self, bucket: int, token: str, core: BucketCore) -> None:
        """Gives a bucket back; those that were not asked for lately are left out of memory."""
        now_s = self._clock()
        with self._lock:
            self._held[bucket] = (token, core, now_s)
            for other in [one for one, (_, _, used_s) in self._held.items() if now_s - used_s > IDLE_S]:
                del self._held[other]

    def clear(self) -> None:
        """Forgets all."""
        with self._lock:
            self._held.clear()

    @property
    def users(self) -> int:
        """Users whose rings are in memory."""
        with self._lock:
            return sum(core.cached_users for _, core, _ in self._held.values())


Opens = Callable[[BucketStore, dict[Source, BucketPlace], int], BucketCore]
"""Makes the core of a bucket of its store, how far it is, and its last erasure."""


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
    """Makes the rows of a portion of a bucket, and notes in the engine's state what the bucket gained.

    1. The bucket, out of the cache or out of the state.
    2. Users who were erased since are forgotten.
    3. Rows.
    4. The state: a delta; or, where deltas have become larger than the snapshot, a new snapshot.

    Args:
        bucket: Its number.
        portion: What it gets.
        cells: The engine's state of it.
        cache: Of this process.
        opens: Makes its core.
        history: N, events kept of a user.
        mask: Of the portion's generation of control.
        join: Adds what is known of users and items.
        new_token: Gives a token that was never given before.

    Raises:
        CorruptStore: The state cannot be read, or lacks an impression that waits.
        PositionConflict: The portion does not go on where the bucket is.
        SaltMismatch: The state is of another salt.
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
    """A bucket as its state has it.

    Raises:
        CorruptStore: A later release wrote it.
        SaltMismatch: It is of another salt.
    """
    store = BucketStore(history)
    for values in (cells.snapshot.read(), cells.deltas.read()):
        for _, delta in sorted(map(decode, values), key=lambda one: one[0]):
            store.take(delta)
    return opens(store, head.places, head.erased)


def write_snapshot(cells: Cells, store: BucketStore) -> int:
    """Replaces snapshot and deltas by what the store has; returns the bytes."""
    cells.snapshot.clear()
    cells.deltas.clear()
    size = 0
    for number, part in enumerate(store.snapshot()):
        value = encode(part, number)
        cells.snapshot.add(value)
        size += len(value)
    return size
