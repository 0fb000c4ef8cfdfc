"""Serving's multi-version store of embedding rows in LMDB: each request reads exactly one version.

    rows      key of `state/rows/tables.py`  -> f32[dim]; empty: removed
    versions  version u64                  -> `Served`, JSON
    dense     version u64                  -> dense tensors, safetensors
    popular   version u64                  -> u64[P] categories
    changes   version u64                  -> u64[2, k] (table, id) written since the preceding stored version
    meta      "served", "before", "serial", "floor", "erased", "format", "begun"; note:<name> -> bytes of the owner

"floor" has, by lane, the version up to which no version may be applied again; "begun" is the version that is being
written in several transactions.

Each base gets its own lane, of which there are 32; deltas use their parent's lane. Entries of other lanes are never
visible, and a lane without versions is deleted. What an interrupted write left is deleted (`undo_interrupted`).

Old versions are dropped in one short transaction. Entries that only they read are deleted afterwards, a few rows at a
time (`tidy`). Rows that a dropped version wrote count as written by the next retained version.

Version numbers only grow. After a rollback to version 30 the next epoch begins at, say, 51 with parent 30. The versions
that version 52 may see are then closed intervals, newest first: `((51, 52), (1, 30))`. Versions 31 to 50 are abandoned:
their rows may still be stored, but no reader of 52 sees them.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import lmdb
import numpy as np
from numpy.typing import NDArray

from state.churn import PREFIX as CHURN
from state.churn import STORED
from state.disk.lmdb_store import LmdbStore
from state.errors import StoreError, UnknownVersion
from state.features.erased import Erased
from state.process import killpoints
from state.registry.manifest import Manifest, Visible, sees
from state.registry.tensor_files import load, save
from state.rows.reader import Databases, LastServed, RowReader, Served, required, stored
from state.rows.tables import (
    CODES,
    COUNTED,
    INTEREST_SCORE,
    ITEM_SCORE,
    LANES,
    OWN,
    TABLES,
    TOP,
    lane_of,
    lane_start,
    row_keys,
    row_prefix,
    tables_in,
    u64,
    version_of,
)
from state.user_shares import UserShares

if TYPE_CHECKING:
    # Imported for type checks only: its kernels load a compiler, which commands do not need.
    from state.ranking.crosses import Crosses

ROWS_AT_ONCE = 1000
ROWS_IN_TRANSACTION = 100
"""Rows checked per transaction. LMDB keeps memory for the pages of its largest transaction, and few rows share a page."""
ENTRIES_IN_TRANSACTION = 1000
"""Entries deleted by their keys per transaction. They are ordered, so that several of them share a page."""
ROUNDS = 25
"""Rounds of at least ROWS_AT_ONCE rows in which all pending rows are checked, so that they do not accumulate."""
LANE_ROWS_AT_ONCE = 20 * ROWS_AT_ONCE  # rows that are deleted without a read cost less

U64 = NDArray[np.uint64]
Tensors = Mapping[str, NDArray[Any]]
Changes = NDArray[np.uint64]
"""`[2, k]`: table and id of each row that versions wrote."""

BEGUN = b"begun"
"""Key in `meta` for a version that needs several transactions: version u64, lane u64, and u64[2, k] (table, id)."""

WRITTEN_AT_ONCE = 1000
"""Rows of a version per transaction, so that most versions are one transaction. With 250, a version took an eighth longer."""


def with_users(tensors: Tensors, shares: UserShares) -> dict[str, NDArray[Any]]:
    """The tensors of a version, with only those rows of table `user` that belong to users of `shares`."""
    selected = dict(tensors)
    for ids, columns in (("user.ids", ("user.ids", "user.rows")), ("user.removed", ("user.removed",))):
        if ids in tensors:
            keep = shares.has(np.asarray(tensors[ids], np.uint64))
            selected |= {name: tensors[name][keep] for name in columns}
    return selected


class Entries(NamedTuple):
    """The rows of one version: keys, values, `[2, k]` uint64 table and id of each, and the row width of each table."""

    keys: list[bytes]
    values: list[bytes]
    changes: NDArray[np.uint64]
    dims: dict[str, int]

    def put(self, cursor: lmdb.Cursor, first: int, end: int | None = None) -> None:
        """Writes the rows from `first` to before `end`."""
        # Without a list of pairs, which would cost collections of garbage.
        cursor.putmulti(zip(self.keys[first:end], self.values[first:end], strict=True))


def entries_of(tensors: Mapping[str, NDArray[Any]], lane: int, version: int) -> Entries:
    """The entries of a version's rows, and empty entries for the rows that it removed."""
    keys, values, dims = list[bytes](), list[bytes](), dict[str, int]()
    changes = [np.empty((2, 0), np.uint64)]
    for name in tables_in(tensors):
        ids = np.asarray(tensors.get(f"{name}.ids", ()), np.uint64)
        removed = np.asarray(tensors.get(f"{name}.removed", ()), np.uint64)
        if not len(ids) + len(removed):
            continue
        if len(ids):
            rows = np.ascontiguousarray(tensors[f"{name}.rows"], "<f4")
            dims[name] = rows.shape[1]
            if (ids[1:] < ids[:-1]).any():
                order = np.argsort(ids, kind="stable")
                ids, rows = ids[order], rows[order]
            values += pieces(rows.tobytes(), 4 * rows.shape[1])
        values += [b""] * len(removed)
        every = np.concatenate((ids, removed))
        table_keys = row_keys(lane, CODES[name], every, version)
        keys += pieces(table_keys.tobytes(), table_keys.shape[1])
        changes.append(np.stack((np.full(len(every), CODES[name], np.uint64), every)))
    return Entries(keys, values, np.concatenate(changes, axis=1), dims)


def pieces(text: bytes, size: int) -> list[bytes]:
    """`text` in pieces of `size` bytes."""
    return [text[at : at + size] for at in range(0, len(text), size)]


def entry_keys(lane: int, rows: Changes, versions: U64) -> Iterator[bytes]:
    """The keys of the entries of `[2, k]` rows, ordered by table, that `[k]` versions wrote."""
    tables, starts = np.unique(rows[0], return_index=True)
    for table, part in zip(tables.tolist(), itertools.pairwise((*starts.tolist(), rows.shape[1])), strict=True):
        keys = row_keys(lane, table, rows[1, slice(*part)], versions[slice(*part)])
        yield from pieces(keys.tobytes(), keys.shape[1])


def undo_interrupted(transaction: lmdb.Transaction, databases: Databases) -> None:
    """Deletes the rows of a version whose writing was interrupted, by the end of the process or a full disk."""
    begun = stored(transaction, BEGUN, databases["meta"])
    if begun is None:
        return
    version, lane = begun[:8], int.from_bytes(begun[8:16], "big")
    if transaction.get(version, db=databases["versions"]) is None:
        tail = u64(TOP - int.from_bytes(version, "big"))
        for table, identity in np.frombuffer(begun[16:], np.uint64).reshape(2, -1).T.tolist():
            transaction.delete(row_prefix(lane, table, identity) + tail, db=databases["rows"])
    transaction.delete(BEGUN, db=databases["meta"])


def put_dense(
    transaction: lmdb.Transaction,
    databases: Databases,
    version: int,
    tensors: Mapping[str, NDArray[Any]],
    parent: int | None,
) -> None:
    """Writes a version's dense weights and popular categories; missing ones are taken from its parent.

    Its weights of churn and of the item score are stored next to its dense weights.
    """
    dense = {name[6:]: np.ascontiguousarray(value) for name, value in tensors.items() if name.startswith("dense.")}
    dense |= {
        f"{STORED}{name}": value
        for name, value in tensors.items()
        if name.startswith((CHURN, ITEM_SCORE, INTEREST_SCORE))
    }
    popular = tensors.get("popular")
    if parent is not None:
        # Weights of a model that an upgrade replaced are not kept.
        dense = dense or load(required(transaction, parent, databases["dense"]))
        if popular is None:
            popular = np.frombuffer(required(transaction, parent, databases["popular"]), "<u8")
    transaction.put(u64(version), save(dense), db=databases["dense"])
    listed = np.asarray(() if popular is None else popular, "<u8")
    transaction.put(u64(version), listed.tobytes(), db=databases["popular"])


def ids_in(transaction: lmdb.Transaction, rows: lmdb._Database, table: str) -> U64:
    """The ids that have an entry in `table` in any version, ascending."""
    cursor, ids = transaction.cursor(rows), set[int]()
    for lane in _lanes(cursor):
        start = row_prefix(lane, CODES[table], 0)[:1]
        if cursor.set_range(start):
            for key in cursor.iternext(values=False):
                if key[:1] != start:
                    break
                ids.add(int.from_bytes(key[1:9], "big"))
    return np.array(sorted(ids), np.uint64)


def delete_entries(
    transaction: lmdb.Transaction, rows: lmdb._Database, ids_by_table: Mapping[str, U64], first: int, after: int
) -> int:
    """Deletes the entries of ids, by table, of versions from `first` to before `after`; returns how many."""
    cursor, deleted = transaction.cursor(rows), 0
    for lane in list(_lanes(cursor)):
        for table, ids in ids_by_table.items():
            for identity in ids.tolist():
                start = row_prefix(lane, CODES[table], identity)
                has_entry = cursor.set_range(start)
                while has_entry and (key := bytes(cursor.key()))[: len(start)] == start:
                    if first <= version_of(key) < after:
                        has_entry = cursor.delete() and bool(cursor.key())
                        deleted += 1
                    else:
                        has_entry = cursor.next()
    return deleted


def _lanes(cursor: lmdb.Cursor) -> Iterator[int]:
    has_entry = cursor.first()
    while has_entry:
        lane = lane_of(bytes(cursor.key()))
        yield lane
        has_entry = cursor.set_range(bytes([lane << 3 | OWN]) + b"\xff" * 21)


class Branch(NamedTuple):
    """The retained versions of one branch, ascending.

    It also has the branch's first version after the branch point, and the intervals before it that its versions see.
    """

    start: int
    before: Visible
    versions: list[int]


def branches_of(retained: Mapping[int, Visible]) -> list[Branch]:
    """The branches that the `retained` versions are on."""
    versions_by_branch: dict[tuple[int, Visible], list[int]] = {}
    for version in sorted(retained):
        (start, _), *before = retained[version]
        versions_by_branch.setdefault((start, tuple(before)), []).append(version)
    return [Branch(start, before, versions) for (start, before), versions in versions_by_branch.items()]


def needed(versions: Sequence[int], branches: Iterable[Branch]) -> set[int]:
    """The entries of one row (their versions, newest first) that some retained version reads.

    >>> needed([9, 7, 5, 2], [Branch(1, (), [6, 7, 8])]) == {7, 5}
    True
    >>> needed([52, 44, 12, 3], [Branch(51, ((1, 30),), [51, 53])]) == {52, 12}
    True
    """
    entries: set[int] = set()
    for start, before, readers in branches:
        newer: int | None = None
        for version in versions:
            if version < start:
                break
            # The oldest reader that may see this entry reads it, unless a newer entry hides it.
            index = bisect_left(readers, version)
            if index < len(readers) and (newer is None or readers[index] < newer):
                entries.add(version)
            newer = version
        if before and (newer is None or newer > readers[0]):
            oldest = next((version for version in versions if sees(before, version)), None)
            if oldest is not None:
                entries.add(oldest)
    return entries


class RowsToSweep(NamedTuple):
    """Rows of a lane that may have entries that no version reads.

    Attributes:
        rows: `[2, k]` uint64, table and id.
        after: If not 0, the versions from `after + 1` to `newest` are on one branch, and only the newest of a row's
            entries from them is read.
        newest: No entry of a later version has to be checked.
        unread: `[k]` uint64, the version of the entry of each row that no version reads; None if that is unknown.
    """

    lane: int
    rows: Changes
    after: int = 0
    newest: int = TOP
    unread: U64 | None = None

    def split(self, count: int) -> tuple[RowsToSweep, RowsToSweep]:
        """The first `count` rows, and the others."""
        parts = (slice(count), slice(count, None))
        first, others = (
            self._replace(rows=self.rows[:, part], unread=None if self.unread is None else self.unread[part])
            for part in parts
        )
        return first, others


class Writers(NamedTuple):
    """Rows and the version that wrote each: `[2, k]` uint64, and `[k]` uint64 with 0 for an unknown version."""

    rows: Changes
    versions: U64

    def to_sweep(self, lane: int, after: int, newest: int) -> list[RowsToSweep]:
        """These entries of versions from `after + 1` to `newest`, which no version reads."""
        is_known = self.versions > 0
        return [
            RowsToSweep(lane, self.rows[:, is_known], after, newest, self.versions[is_known]),
            RowsToSweep(lane, self.rows[:, ~is_known], after, newest),
        ]


@dataclass
class Dropped:
    """Dropped versions, the rows to sweep, and the versions that wrote the rows of their heirs, by heir."""

    versions: Collection[int]
    to_sweep: list[RowsToSweep] = field(default_factory=list)
    writers: dict[int, U64] = field(default_factory=dict)


def newest_writers(parts: Sequence[Writers]) -> tuple[Writers, Writers]:
    """Divides what successive versions wrote, oldest first: the last entry of each row, and those that these supersede.

    Both are ordered by table and id.

    >>> parts = [Writers(np.array([[1, 1], rows], np.uint64), np.full(2, version, np.uint64))
    ...          for version, rows in ((4, [7, 8]), (5, [7, 9]))]
    >>> [[*zip(part.rows[1].tolist(), part.versions.tolist())] for part in newest_writers(parts)]
    [[(7, 5), (8, 4), (9, 5)], [(7, 4)]]
    """
    rows = np.concatenate([part.rows for part in parts], axis=1)
    versions = np.concatenate([part.versions for part in parts])
    # It is stable, so that entries of a row stay in the order of the versions.
    order = np.lexsort((rows[1], rows[0]))
    rows, versions = rows[:, order], versions[order]
    is_last = np.append((rows[:, 1:] != rows[:, :-1]).any(axis=0), np.ones(min(1, len(versions)), np.bool_))
    return Writers(rows[:, is_last], versions[is_last]), Writers(rows[:, ~is_last], versions[~is_last])


def delete_superseded(cursor: lmdb.Cursor, prefix: bytes, after: int, newest: int) -> None:
    """Deletes the entries of one row of versions from `after + 1` to `newest`, except the newest of these entries."""
    end = prefix + u64(TOP - after)
    has_entry = cursor.set_range(prefix + u64(TOP - newest)) and bytes(cursor.key()) < end and cursor.next()
    while has_entry and bytes(cursor.key()) < end:
        has_entry = cursor.delete() and bool(cursor.key())


def delete_unread(cursor: lmdb.Cursor, prefix: bytes, newest: int, branches: Sequence[Branch]) -> int:
    """Deletes the entries of one row of versions up to `newest` that no version on `branches` reads.

    A tombstone without older entries is deleted too, because a missing entry reads the same.

    Returns:
        The newest deleted tombstone that was read; 0 if none was. No version up to it may be applied to this lane
        again.
    """
    is_tombstone: dict[int, bool] = {}
    has_entry = cursor.set_range(prefix + u64(TOP - newest))
    while has_entry and (key := bytes(cursor.key())).startswith(prefix):
        is_tombstone[version_of(key)] = not cursor.value()
        has_entry = cursor.next()
    read = sorted(needed([*is_tombstone], branches))
    redundant = [*itertools.takewhile(is_tombstone.__getitem__, read)]
    for version in is_tombstone.keys() - read[len(redundant) :]:
        if cursor.set_key(prefix + u64(TOP - version)):
            cursor.delete()
    return max(redundant, default=0)


class RowStore(LmdbStore):
    """The row store. One thread of one process writes; any number of processes read.

    Arguments and errors are those of `LmdbStore`.
    """

    noun = "rows"
    databases = ("rows", "versions", "dense", "popular", "changes")
    writer = "the applier"
    remedy = "remove it: the applier rebuilds it from the registry"
    origin = "the registry"

    def _bind(self) -> None:
        opened = self._databases
        self._rows, self._versions, self._changes = opened["rows"], opened["versions"], opened["changes"]
        self._last = LastServed()
        # The rows to check, and whether a lane without versions may have rows.
        self._to_sweep: deque[RowsToSweep] = deque()
        self._has_dead_lanes = True
        # The versions that wrote the rows of `changes`, by version; those of an earlier process are unknown.
        self._writers: dict[int, U64] = {}

    @contextmanager
    def reader(self) -> Iterator[RowReader]:
        """A read transaction over rows, dense weights, popular categories and pointer."""
        with self._env.begin() as transaction:
            yield RowReader(transaction, self._databases, self._last)

    def accepts(self, manifest: Manifest) -> bool:
        """Whether `apply` accepts this version now: a base, or a delta whose parent's lane has all required entries."""
        with self._env.begin() as transaction:
            return manifest.kind == "base" or self._parent(manifest, transaction) is not None

    def _parent(self, manifest: Manifest, transaction: lmdb.Transaction) -> Served | None:
        """The parent of a delta, if all entries that the delta needs are stored."""
        if manifest.kind == "base" or manifest.parent is None:
            return None
        record = stored(transaction, u64(manifest.parent), self._versions)
        parent = None if record is None else Served.parse(record)
        if parent is None or manifest.version <= self._floors(transaction).get(str(parent.lane), 0):
            return None
        return parent

    def _floors(self, transaction: lmdb.Transaction) -> dict[str, int]:
        """By lane, the version up to which no version may be applied again."""
        floors: dict[str, int] = json.loads(stored(transaction, b"floor", self._meta) or b"{}")
        return floors

    def _put_floors(self, transaction: lmdb.Transaction, floors: Mapping[str, int]) -> None:
        transaction.put(b"floor", json.dumps(floors).encode(), db=self._meta)

    def apply(
        self, manifest: Manifest, tensors: Tensors, now_ms: int, follow: bool = False, replace: bool = False
    ) -> bool:
        """Adds one version, atomically for all readers; returns False if it was stored already and `replace` is false.

        1. Delete what an interrupted write left, choose the lane, and record the rows of a version that needs several
           transactions.
        2. Write such a version's first rows, WRITTEN_AT_ONCE per transaction. No reader sees them. LMDB keeps memory
           for the pages of its largest transaction, and few rows share a page.
        3. In one transaction, write the other rows and the version itself.

        Args:
            manifest: The version; a base sees its own rows only, a delta its parent's too.
            tensors: `<table>.ids` `[k]` uint64, `<table>.rows` `[k, dim]` float32, `<table>.removed` `[r]` uint64,
                `dense.<name>`, `popular` `[P]` uint64. Without dense tensors, the parent's are used. Rows of users of
                other shares are left out.
            now_ms: The time of application.
            follow: Makes serving use the version from then on, in the same transaction.
            replace: Applies the version again if it is applied already (a rebuilt lane).

        Raises:
            UnknownVersion: The parent is not stored, or entries that the delta needs were deleted.
            StoreFull, UnusableDisk: No visible row was changed.
        """
        version = manifest.version
        if not self.shares.is_all:
            tensors = with_users(tensors, self.shares)
        # 1.
        with self._write() as transaction:
            undo_interrupted(transaction, self._databases)
            is_applied = transaction.get(u64(version), db=self._versions) is not None
            if is_applied and not replace:
                if follow:
                    self._point(version, transaction)
                return False
            parent = self._parent(manifest, transaction)
            if parent is None and manifest.kind != "base":
                raise UnknownVersion(
                    f"version {version} builds on version {manifest.parent}, whose rows are not here",
                    "apply its base",
                )
            lane = self._free_lane(transaction) if parent is None else parent.lane
            entries = entries_of(tensors, lane, version)
            early = max(0, len(entries.keys) - 1) // WRITTEN_AT_ONCE * WRITTEN_AT_ONCE
            if early:
                transaction.put(BEGUN, u64(version) + u64(lane) + entries.changes.tobytes(), db=self._meta)
        # 2.
        for begin in range(0, early, WRITTEN_AT_ONCE):
            with self._write() as transaction:
                entries.put(transaction.cursor(self._rows), begin, begin + WRITTEN_AT_ONCE)
            killpoints.reach("rows.begun")
        # 3.
        with self._write() as transaction:
            dropped = self._drop(transaction, self._visible_by_lane(transaction), {version}) if is_applied else None
            entries.put(transaction.cursor(self._rows), early)
            transaction.delete(BEGUN, db=self._meta)
            transaction.put(u64(version), entries.changes.tobytes(), db=self._changes)
            put_dense(transaction, self._databases, version, tensors, None if parent is None else parent.version)
            dims = entries.dims if parent is None else {**parent.dims, **entries.dims}
            record = Served.of(manifest, parent, self._next_serial(transaction), lane, dims, now_ms)
            transaction.put(u64(version), record.to_json(), db=self._versions)
            if follow or version == self._served(transaction):
                self._point(version, transaction)
            is_newest = not transaction.cursor(self._versions).set_range(u64(version + 1))
        if dropped is not None:
            self._remember(dropped)
        if is_newest:
            self._writers[version] = np.broadcast_to(np.uint64(version), len(entries.keys))
        else:
            # Later versions may now read its entries in place of those that their lists of changes name.
            self._writers.clear()
        # A version that was dropped before reads older entries than the next one.
        self._to_sweep = deque(
            RowsToSweep(sweep.lane, sweep.rows) if sweep.after < version <= sweep.newest else sweep
            for sweep in self._to_sweep
        )
        return True

    def _next_serial(self, transaction: lmdb.Transaction) -> int:
        serial = int.from_bytes(stored(transaction, b"serial", self._meta) or b"", "big") + 1
        transaction.put(b"serial", u64(serial), db=self._meta)
        return serial

    def _served(self, transaction: lmdb.Transaction) -> int:
        """The version that serving uses; 0 before the first."""
        return int.from_bytes((stored(transaction, b"served", self._meta) or b"")[:8], "big")

    def _point(self, version: int, transaction: lmdb.Transaction) -> None:
        record = Served.parse(required(transaction, version, self._versions))
        before = self._served(transaction)
        if before and before != version:
            transaction.put(b"before", u64(before), db=self._meta)
        transaction.put(b"served", u64(version) + u64(record.serial), db=self._meta)

    def serve(self, version: int) -> None:
        """Moves the pointer, so that serving uses `version` from now on; UnknownVersion if it is not applied."""
        self.steer({}, version)

    def steer(self, notes: Mapping[str, bytes], version: int | None = None) -> None:
        """Stores the owner's `notes` and, with `version`, moves the pointer, in one transaction.

        Raises:
            UnknownVersion: `version` is not applied; nothing was changed.
        """
        with self._write() as transaction:
            for name, value in notes.items():
                transaction.put(b"note:" + name.encode(), value, db=self._meta)
            if version is not None:
                self._point(version, transaction)

    def _free_lane(self, transaction: lmdb.Transaction) -> int:
        used = {record.lane for record in self._records(transaction)}
        for lane in range(LANES):
            cursor = transaction.cursor(self._rows)
            has_rows = bool(cursor.set_range(lane_start(lane))) and lane_of(bytes(cursor.key())) == lane
            if lane not in used and not has_rows:
                # Any version may be added to this lane again.
                floors = {name: floor for name, floor in self._floors(transaction).items() if name != str(lane)}
                self._put_floors(transaction, floors)
                return lane
        raise StoreError(
            f"all {LANES} lanes of {self.path} hold versions", "lower serving.keep_s so that old ones are swept"
        )

    def drop(self, versions: Collection[int]) -> int:
        """Drops these versions except the served one, with their dense weights; returns the number of dropped versions.

        `tidy` deletes their leftover rows.
        """
        with self._write() as transaction:
            lanes = self._visible_by_lane(transaction)
            leaving = {*itertools.chain(*lanes.values())} & {*versions} - {self._served(transaction)}
            dropped = self._drop(transaction, lanes, leaving)
        self._remember(dropped)
        return len(leaving)

    def _records(self, transaction: lmdb.Transaction) -> list[Served]:
        return [Served.parse(record) for _, record in transaction.cursor(self._versions)]

    def _visible_by_lane(self, transaction: lmdb.Transaction) -> dict[int, dict[int, Visible]]:
        """The intervals that each applied version sees, by lane and version."""
        lanes: dict[int, dict[int, Visible]] = {}
        for record in self._records(transaction):
            lanes.setdefault(record.lane, {})[record.version] = record.visible
        return lanes

    def _drop(
        self, transaction: lmdb.Transaction, lanes: Mapping[int, Mapping[int, Visible]], versions: Collection[int]
    ) -> Dropped:
        """Deletes versions, except their rows; `_remember` takes the result once the transaction is committed."""
        done = Dropped(versions)
        for lane, in_lane in lanes.items():
            dropped = [version for version in in_lane if version in versions]
            retained = {version: visible for version, visible in in_lane.items() if version not in versions}
            if not retained:
                self._has_dead_lanes = True
            elif dropped:
                self._inherit(transaction, lane, dropped, retained, done)
        for version in versions:
            for name in ("versions", "dense", "popular", "changes"):
                transaction.delete(u64(version), db=self._databases[name])
        return done

    def _remember(self, dropped: Dropped) -> None:
        self._to_sweep += (sweep for sweep in dropped.to_sweep if sweep.rows.shape[1])
        for version in dropped.versions:
            self._writers.pop(version, None)
        self._writers |= dropped.writers

    def _inherit(
        self,
        transaction: lmdb.Transaction,
        lane: int,
        dropped: Sequence[int],
        retained: Mapping[int, Visible],
        done: Dropped,
    ) -> None:
        """Adds the changes of a lane's dropped versions, ascending, to those of the next retained versions, the heirs.

        Adds the rows to sweep to `done`. If the retained versions are on one branch, neither the version before the
        dropped ones nor versions after the heir read entries between the two.
        """
        is_one_branch = len(branches_of(retained)) == 1
        for heir, group in itertools.groupby(
            dropped, lambda version: min((later for later in retained if later > version), default=None)
        ):
            versions = [*group]
            previous = max((earlier for earlier in retained if earlier < versions[0]), default=0)
            if is_one_branch and heir is not None and not previous:
                # The heir becomes the oldest version of the branch. It reads all rows of the first dropped version
                # that no later version wrote.
                del versions[0]
            parts = [self._written_by(transaction, version) for version in (*versions, *([heir] if heir else ()))]
            read, superseded = newest_writers(parts)
            if heir is not None:
                transaction.put(u64(heir), read.rows.tobytes(), db=self._changes)
                done.writers[heir] = read.versions
            if not is_one_branch:
                done.to_sweep.append(RowsToSweep(lane, read.rows))
            elif heir is None or not previous:
                done.to_sweep.append(RowsToSweep(lane, read.rows, previous, TOP if heir is None else heir))
            else:
                # If a row was written once since the previous version, the heir reads that entry, and the previous
                # version reads an older one.
                done.to_sweep += superseded.to_sweep(lane, previous, heir)

    def _written_by(self, transaction: lmdb.Transaction, version: int) -> Writers:
        rows = np.frombuffer(required(transaction, version, self._changes), np.uint64).reshape(2, -1)
        return Writers(rows, self._writers.get(version, np.zeros(rows.shape[1], np.uint64)))

    def tidy(self, at_most: int | None = None) -> bool:
        """Checks at most `at_most` rows of dropped versions, and deletes unread entries; returns whether rows remain.

        The default is ROWS_AT_ONCE or more.
        """
        if not self._to_sweep and not self._has_dead_lanes:
            return False
        if at_most is None:
            at_most = max(ROWS_AT_ONCE, sum(sweep.rows.shape[1] for sweep in self._to_sweep) // ROUNDS)
        retained: dict[int, list[Branch]] = {}
        if self._has_dead_lanes or any(sweep.after == 0 for sweep in self._to_sweep):
            with self._env.begin() as transaction:
                lanes = self._visible_by_lane(transaction)
            retained = {lane: branches_of(versions) for lane, versions in lanes.items()}
        while at_most > 0 and self._to_sweep:
            most = ROWS_IN_TRANSACTION if self._to_sweep[0].unread is None else ENTRIES_IN_TRANSACTION
            at_most -= self._sweep(retained, min(at_most, most))
        if at_most > 0 and self._has_dead_lanes and not self._to_sweep:
            self._delete_dead_lanes(retained)
        return bool(self._to_sweep) or self._has_dead_lanes

    def _sweep(self, retained: Mapping[int, Sequence[Branch]], at_most: int) -> int:
        sweep, remaining = self._to_sweep[0].split(at_most)
        branches, floor = retained.get(sweep.lane, ()), 0
        with self._write() as transaction:
            if sweep.unread is not None:
                for key in entry_keys(sweep.lane, sweep.rows, sweep.unread):
                    transaction.delete(key, db=self._rows)
            else:
                cursor = transaction.cursor(self._rows)
                for table, identity in sweep.rows.T.tolist():
                    prefix = row_prefix(sweep.lane, table, identity)
                    if sweep.after:
                        delete_superseded(cursor, prefix, sweep.after, sweep.newest)
                    else:
                        floor = max(floor, delete_unread(cursor, prefix, sweep.newest, branches))
            if floor and floor > (floors := self._floors(transaction)).get(str(sweep.lane), 0):
                self._put_floors(transaction, {**floors, str(sweep.lane): floor})
        if remaining.rows.shape[1]:
            self._to_sweep[0] = remaining
        else:
            self._to_sweep.popleft()
        return int(sweep.rows.shape[1])

    def _delete_dead_lanes(self, retained: Mapping[int, Sequence[Branch]]) -> None:
        empty, at_most = set(range(LANES)) - {*retained}, LANE_ROWS_AT_ONCE
        with self._write() as transaction:
            for lane in sorted(empty):
                cursor = transaction.cursor(self._rows)
                cursor.set_range(lane_start(lane))
                # The cursor has an empty key after the last row of all.
                while (key := bytes(cursor.key())) and lane_of(key) == lane:
                    if not at_most:
                        empty.discard(lane)
                        break
                    cursor.delete()
                    at_most -= 1
            floors = self._floors(transaction)
            remaining = {lane: floor for lane, floor in floors.items() if int(lane) not in empty}
            if remaining != floors:
                self._put_floors(transaction, remaining)
        self._has_dead_lanes = len(empty) + len(retained) < LANES

    def forget(self, erased: Erased, crosses: Crosses, version: int | None = None) -> int:
        """Deletes entries of erased users that versions before the erasures wrote; returns the number of entries.

        `crosses` are those of the settings. With `version`, it checks only the entries of that version. Otherwise it
        checks all stored versions and records this, see `erased`. Serving at such a version leaves these users' rows
        out anyway.
        """
        deleted = 0
        with self._write() as transaction:
            records = self._records(transaction)
            known_ids = [ids_in(transaction, self._rows, table) for table in ("item", "category", "context")]
            # The tables that may have rows of users: the user table, and a ranker's own tables.
            tables = {"user", *(name for record in records for name in record.dims if name not in (*TABLES, *COUNTED))}
            for erasure in erased:
                later = min((record.version for record in records if record.erased >= erasure.id), default=1 << 63)
                wrote = (0, later) if version is None else (version, version + 1)
                ids_by_table = dict.fromkeys(tables, erasure.users.ids)
                pairs = [crosses.of_user(user, *known_ids) for user in erasure.users]
                ids_by_table["cross"] = np.concatenate([np.empty(0, np.uint64), *pairs])
                deleted += delete_entries(transaction, self._rows, ids_by_table, *wrote)
                before = [record.version for record in records if record.erased < erasure.id]
                for writer in before if version is None else [version]:
                    self._leave_out(transaction, writer, np.concatenate([*ids_by_table.values()]))
            if version is None:
                transaction.put(b"erased", u64(erased.last), db=self._meta)
        return deleted

    def _leave_out(self, transaction: lmdb.Transaction, version: int, ids: U64) -> None:
        written = np.frombuffer(transaction.get(u64(version), b"", db=self._changes), np.uint64).reshape(2, -1)
        is_erased = np.isin(written[1], ids)
        if is_erased.any():
            transaction.put(u64(version), written[:, ~is_erased].tobytes(), db=self._changes)
            self._writers.pop(version, None)

    def erased(self) -> int:
        """The id of the last erasure that is fully applied."""
        with self._env.begin() as transaction:
            return int.from_bytes(stored(transaction, b"erased", self._meta) or b"", "big")

    def entries(self) -> int:
        """How many row entries are stored, over all versions."""
        with self._env.begin() as transaction:
            return int(transaction.stat(self._rows)["entries"])
