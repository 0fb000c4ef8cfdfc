"""Each store as the conformance suite uses it: commits that change all its parts to one number, and whether the parts agree."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

import state
from state.attributes.values import AttributeStore, TopicPosition, ids_in, pack
from state.disk.lmdb_store import LmdbStore
from state.features.spec import EVENT
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.positions import Range, Source
from state.registry.manifest import LogRange, Manifest
from state.rows.store import RowStore
from state.segments import Membership, SegmentsPosition, SegmentStore

MAP = 64 << 20
SOURCE = Source("ab" * 16, 0)
Store = TypeVar("Store", bound=LmdbStore)


class Kept(ABC, Generic[Store]):
    """One kind of store.

    Attributes:
        kind: Its class.
    """

    kind: type[Store]

    def open(self, path: Path, map_bytes: int = MAP, readonly: bool = False, boot_id: str | None = None) -> Store:
        """Opens the store; a class whose arguments are others overrides this."""
        return self.kind(path, map_bytes, readonly, boot_id)

    def open_or_rebuild(self, path: Path) -> Store:
        """Opens it for its writer, an empty one where it cannot be used."""
        return self.kind.open_or_rebuild(path, MAP)

    @abstractmethod
    def commit(self, store: Store, number: int, size: int = 20) -> None:
        """The commit `number`, from 1 on: sets `size` entries, and something in each other part, to it."""

    @abstractmethod
    def seen(self, store: Store) -> int:
        """The number of the last commit, 0 where there was none. Fails where a part has another."""


class Histories(Kept[HistoryStore]):
    """The histories: events, positions, the owner's values and waiting rows."""

    kind = HistoryStore

    def open(
        self, path: Path, map_bytes: int = MAP, readonly: bool = False, boot_id: str | None = None
    ) -> HistoryStore:
        return HistoryStore(path, 32, map_bytes, readonly, boot_id)

    def open_or_rebuild(self, path: Path) -> HistoryStore:
        return HistoryStore.open_or_rebuild(path, 32, MAP)

    def commit(self, store: HistoryStore, number: int, size: int = 20) -> None:
        events = np.zeros(size, EVENT)
        events["offset"] = number
        first = store.positions().get(SOURCE, 0)
        store.commit(
            Appends.of(np.arange(size, dtype=np.uint64), events),
            [Range(SOURCE, first, first + size, rows=size)],
            {"number": b"%d" % number},
            {b"key": b"%d" % number},
        )

    def seen(self, store: HistoryStore) -> int:
        # One read transaction each: only what a single one gives must agree.
        offsets = {int(events["offset"][-1]) for events in store.read_many(range(20)) if len(events)}
        counts, waiting = store.cut()
        assert len(offsets) <= 1 and waiting == len(counts)
        return max(offsets, default=0)


def sweep(store: RowStore, horizon_ms: int, keep: Sequence[int] = ()) -> int:
    """Drops the versions applied before `horizon_ms` except the served one and those of `keep`, with all their rows."""
    with store.reader() as reader:
        old = [one.version for one in reader.versions() if one.applied_at_ms < horizon_ms]
    dropped = store.drop({*old} - {*keep})
    while store.tidy():
        pass
    return dropped


class Rows(Kept[RowStore]):
    """Serving's rows: rows, dense weights and pointer."""

    kind = RowStore

    def commit(self, store: RowStore, number: int, size: int = 20) -> None:
        tensors: dict[str, Any] = {
            "user.ids": np.arange(size, dtype=np.uint64),
            "user.rows": np.full((size, 4), number, np.float32),
            "dense.w": np.array([number], np.float32),
        }
        store.apply(manifest(number), tensors, number, follow=True)
        if number % 20 == 0:
            sweep(store, number - 10)

    def seen(self, store: RowStore) -> int:
        with store.reader() as reader:
            served = reader.served()
            if served is None:
                return 0
            rows, known = reader.get("user", range(20), served)
            (dense,) = reader.dense(served.version)["w"].tolist()
            assert known.all() and {dense, *rows.reshape(-1).tolist()} == {float(served.version)}
            return served.version


class Attributes(Kept[AttributeStore]):
    """Attributes: values, and how far their topic was read."""

    kind = AttributeStore

    def commit(self, store: AttributeStore, number: int, size: int = 20) -> None:
        value = pack([number], ["a" * 60])
        store.commit("user", dict.fromkeys(range(size), value), TopicPosition("identity", SOURCE.topic_id, {0: number}))

    def seen(self, store: AttributeStore) -> int:
        values = store.read_many("user", range(20))
        ids = {int(ids_in(value, 1)[0]) for value in values if value is not None}
        assert len(ids) <= 1
        return max(ids, default=0)


class Segments(Kept[SegmentStore]):
    """Members, sizes, and how far the topic was read."""

    kind = SegmentStore

    def commit(self, store: SegmentStore, number: int, size: int = 20) -> None:
        changes = {("sporty", user): Membership(number, number) for user in range(size)}
        store.commit(changes, SegmentsPosition(SOURCE.topic_id, {0: number}))

    def seen(self, store: SegmentStore) -> int:
        found = {one for _, one in store.page("sporty", 0, 20)}
        assert len(found) <= 1 and all(one.since_ms == one.version for one in found)
        return max((one.version for one in found), default=0)


def manifest(number: int) -> Manifest:
    """Of version `number`, which follows the one before; 1 is a base."""
    return Manifest(
        version=number, kind="delta" if number > 1 else "base", epoch=1, parent=number - 1 or None,
        visible=((number, number),), log=LogRange(), sources=((SOURCE, number),), steps=number, rows=number,
        created_at_ms=number, event_time_ms=number, spec="spec", program="program", salt="salt", mask_generation=0,
        metrics={}, environment={}, files={},
    )  # fmt: skip


def kinds() -> list[type[LmdbStore]]:
    """Every store there is under `state`, found by walking it."""
    for module in pkgutil.walk_packages(state.__path__, "state."):
        importlib.import_module(module.name)
    found, left = [], LmdbStore.__subclasses__()
    while left:
        found.append(left.pop())
        left += found[-1].__subclasses__()
    ours = (one for one in found if one.__module__.startswith("state.") and hasattr(one, "noun"))
    return sorted(ours, key=lambda one: one.__name__)


KEPT: dict[type[LmdbStore], Kept[Any]] = {one.kind: one for one in (Histories(), Rows(), Attributes(), Segments())}
