"""Serving's multi-version embedding rows in LMDB: an answer reads exactly one version.

    rows      lane|table u8, id u64, ~version u64   (big-endian) -> f32[dim]; empty: removed
    versions  version u64                           -> record, JSON
    dense     version u64                           -> dense tensors, safetensors
    popular   version u64                           -> u64[P] categories
    changes   version u64                           -> u64[2, k] (table, id) written by it
    meta      "served", "serial", "floor"; note:<name> -> bytes of the owner

A reader at version V makes one range seek per row: the version is stored
inverted, so that the newest entry not above V comes first. A base goes into a
lane of its own (there are 32), and deltas follow their parent's lane; what
another lane holds is never seen, and a lane without versions is deleted.

The store is a copy of the registry. After a power cut it is begun anew.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from state.disk import clean_mark as mark
from state.errors import StoreError, StoreFull, UnknownVersion
from state.registry.manifest import Manifest, Visible, extend
from state.rows.lineage import needed, segments

TABLES = ("user", "item", "category", "context", "cross", "transition")
LANES = 32
MAX_READERS = 512
LANE_ROWS_PER_SWEEP = 50_000
_PLACES = {name: place for place, name in enumerate(TABLES)}
_TOP = (1 << 64) - 1

Tensors = Mapping[str, NDArray[Any]]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """One applied version.

    Attributes:
        serial: Number of the application; a version applied again has another one.
        lane: Where its rows are.
        visible: Which entries of the lane it sees, newest interval first.
        dims: Width of each table's rows.
        sources: Next offset of each source that it was trained on, by the source's text form.
    """

    version: int
    epoch: int
    parent: int | None
    serial: int
    lane: int
    visible: Visible
    dims: Mapping[str, int]
    created_at_ms: int
    event_time_ms: int
    applied_at_ms: int
    spec: str
    program: str
    salt: str
    mask_generation: int
    sources: Mapping[str, int]

    @classmethod
    def parse(cls, record: bytes | memoryview) -> Served:
        """The version that `to_json` wrote."""
        fields = json.loads(bytes(record))
        fields["visible"] = tuple((low, high) for low, high in fields["visible"])
        return cls(**fields)

    def to_json(self) -> bytes:
        """This version as a JSON object."""
        return json.dumps(asdict(self)).encode()


def _stored(transaction: lmdb.Transaction, key: bytes, db: lmdb._Database) -> bytes | None:
    value = transaction.get(key, db=db)
    return None if value is None else bytes(value)


def _must(transaction: lmdb.Transaction, version: int, db: lmdb._Database) -> bytes:
    value = _stored(transaction, _u64(version), db)
    if value is None:
        raise UnknownVersion(f"version {version} is not applied here; apply it before it is served")
    return value


def _u64(number: int) -> bytes:
    return number.to_bytes(8, "big")


def row_keys(lane: int, table: int, ids: NDArray[np.uint64], version: int) -> NDArray[np.uint8]:
    """The stored keys of `ids` at `version`.

    Args:
        lane: Below 32.
        table: Index into `TABLES`.
        ids: `[k]` uint64.
        version: The version that wrote them.

    Returns:
        `[k, 17]` uint8.

    >>> row_keys(1, 2, np.array([258], np.uint64), 1).tobytes().hex()
    '0a0000000000000102fffffffffffffffe'
    """
    keys = np.empty((len(ids), 17), np.uint8)
    keys[:, 0] = lane << 3 | table
    keys[:, 1:9] = ids.astype(">u8").view(np.uint8).reshape(-1, 8)
    keys[:, 9:] = np.frombuffer(_u64(_TOP - version), np.uint8)
    return keys


class RowReader:
    """One read transaction: everything it returns is of one moment. Use it in one thread."""

    def __init__(self, store: RowStore, transaction: lmdb.Transaction) -> None:
        self._store = store
        self._transaction = transaction
        self._cursor = transaction.cursor(store.rows)

    def served(self) -> Served | None:
        """The version that answers use; None before the first."""
        pointer = _stored(self._transaction, b"served", self._store.meta)
        if pointer is None:
            return None
        return self._store.parsed(pointer, self._transaction)

    def note(self, name: str) -> bytes | None:
        """What `steer` last stored under `name`."""
        return _stored(self._transaction, b"note:" + name.encode(), self._store.meta)

    def version(self, version: int) -> Served | None:
        """An applied version, or None."""
        record = _stored(self._transaction, _u64(version), self._store.versions)
        return None if record is None else Served.parse(record)

    def versions(self) -> list[Served]:
        """All applied versions, oldest first."""
        return [Served.parse(record) for _, record in self._transaction.cursor(self._store.versions)]

    def get(self, table: str, ids: Sequence[int], at: Served) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Rows of `ids` as version `at` has them.

        Args:
            table: One of `TABLES`.
            ids: Ids of rows.
            at: An applied version.

        Returns:
            `[n, dim]` float32, zeros where missing, and `[n]` bool, whether each id has a row.
        """
        dim = at.dims.get(table, 0)
        found = [self.row(table, identity, at) for identity in ids]
        missing = bytes(4 * dim)
        rows = np.frombuffer(b"".join([row or missing for row in found]), np.float32).reshape(len(found), dim)
        return rows, np.array([row is not None for row in found], np.bool_)

    def row(self, table: str, identity: int, at: Served) -> bytes | None:
        """The bytes of one row, `[dim]` float32, as version `at` has it; None where it has none."""
        cursor = self._cursor
        stem = ((at.lane << 3 | _PLACES[table]) << 64 | identity).to_bytes(9, "big")
        for lowest, highest in at.visible:
            if not cursor.set_range(stem + (_TOP - highest).to_bytes(8, "big")):
                return None
            key = cursor.key()
            if key[:9] != stem:
                return None
            if _TOP - int.from_bytes(key[9:], "big") >= lowest:
                return bytes(cursor.value()) or None
            # The entry is of an abandoned version or of an older interval: seek again from the next one.
        return None

    def dense(self, version: int) -> dict[str, NDArray[Any]]:
        """The dense tensors of an applied version, by their names without `dense.`."""
        return load_tensors(_must(self._transaction, version, self._store.dense_db))

    def popular(self, version: int) -> NDArray[np.uint64]:
        """`[P]` uint64: the popular categories of an applied version, most popular first."""
        return np.frombuffer(_must(self._transaction, version, self._store.popular_db), "<u8").astype(np.uint64)


class RowStore:
    """The store; one process writes (one thread of it), any number of processes read.

    Args:
        path: Its directory, made where it is missing.
        map_bytes: Upper bound of its size; address space, not memory.
        readonly: Opens an existing store for reading only.

    Raises:
        StoreError: `readonly` and there is no store yet.
    """

    def __init__(self, path: Path, map_bytes: int = 1 << 34, readonly: bool = False) -> None:
        self.path = path
        self._mark = path / "mark.json"
        self._readonly = readonly
        try:
            if not readonly:
                self._begin_anew_after_power_cut()
                path.mkdir(parents=True, exist_ok=True)
                # On disk before the first page that it warns of.
                mark.write(self._mark, clean=False)
            self._environment = lmdb.open(
                str(path), map_size=map_bytes, max_dbs=8, max_readers=MAX_READERS,
                readonly=readonly, create=not readonly, sync=False, readahead=False,
            )  # fmt: skip
            names = ("rows", "versions", "dense", "popular", "changes", "meta")
            opened = [self._environment.open_db(name.encode(), create=not readonly) for name in names]
        except (lmdb.Error, OSError) as error:
            do = (
                "start the applier, which makes it"
                if readonly
                else "free space or correct the directory's access rights"
            )
            raise StoreError(f"no usable row store in {path} ({error}); {do}") from None
        self.rows, self.versions, self.dense_db, self.popular_db, self._changes, self.meta = opened
        self._parsed: tuple[bytes, Served] | None = None

    def _begin_anew_after_power_cut(self) -> None:
        # Unsynced pages survive a killed process, not a power cut: then the boot id is another one.
        if self._mark.exists() and not mark.is_trusted(self._mark.read_bytes(), mark.boot_id()):
            _log.warning(
                "the row store %s was open when the machine went down, so that pages may be missing; "
                "it is begun anew from the registry",
                self.path,
            )
            shutil.rmtree(self.path)

    def parsed(self, pointer: bytes, transaction: lmdb.Transaction) -> Served:
        """The record a pointer (version, serial) names; the last one parsed is kept."""
        last = self._parsed
        if last is None or last[0] != pointer:
            last = self._parsed = (
                pointer,
                Served.parse(_must(transaction, int.from_bytes(pointer[:8], "big"), self.versions)),
            )
        return last[1]

    @contextmanager
    def reader(self) -> Iterator[RowReader]:
        """A read transaction over rows, dense weights, popular categories and pointer."""
        with self._environment.begin() as transaction:
            yield RowReader(self, transaction)

    @contextmanager
    def _writing(self) -> Iterator[lmdb.Transaction]:
        try:
            with self._environment.begin(write=True) as transaction:
                yield transaction
        except (lmdb.Error, OSError) as error:
            raise StoreFull(
                f"the row store {self.path} could not be written ({error}); nothing was changed: free disk space or "
                "raise serving.map_gb, and start again"
            ) from None

    def accepts(self, manifest: Manifest) -> bool:
        """Whether `apply` would take this version now: a base, or a delta whose parent's lane still holds all it needs."""
        with self._environment.begin() as transaction:
            return manifest.kind == "base" or self._parent(manifest, transaction) is not None

    def _parent(self, manifest: Manifest, transaction: lmdb.Transaction) -> Served | None:
        if manifest.parent is None:
            return None
        record = _stored(transaction, _u64(manifest.parent), self.versions)
        parent = None if record is None else Served.parse(record)
        if parent is None or manifest.version <= self._floors(transaction).get(str(parent.lane), 0):
            return None
        return parent

    def _floors(self, transaction: lmdb.Transaction) -> dict[str, int]:
        floors: dict[str, int] = json.loads(_stored(transaction, b"floor", self.meta) or b"{}")
        return floors

    def apply(
        self, manifest: Manifest, tensors: Tensors, now_ms: int, follow: bool = False, replace: bool = False
    ) -> bool:
        """Adds one version in one transaction; with `follow` answers use it from then on.

        Args:
            manifest: The version; a base sees its own rows only, a delta its parent's too.
            tensors: `<table>.ids` `[k]` uint64, `<table>.rows` `[k, dim]` float32, `<table>.removed` `[r]`
                uint64, `dense.<name>`, `popular` `[P]` uint64. Dense tensors left out are the parent's.
            now_ms: The time of application.
            follow: Moves the pointer in the same transaction.
            replace: Applies it again where it is applied already (a rebuilt lane).

        Returns:
            Whether it was added; False where it was there.

        Raises:
            UnknownVersion: The parent is not here, or what the delta builds on was swept.
            StoreFull: Disk or map are full; nothing was changed.
        """
        with self._writing() as transaction:
            key = _u64(manifest.version)
            if not replace and transaction.get(key, db=self.versions) is not None:
                if follow:
                    self._point(manifest.version, transaction)
                return False
            parent = None
            if manifest.kind != "base":
                parent = self._parent(manifest, transaction)
                if parent is None:
                    raise UnknownVersion(
                        f"version {manifest.version} builds on version {manifest.parent}, whose rows are not here; apply its base"
                    )
            lane = self._free_lane(transaction) if parent is None else parent.lane
            dims = {} if parent is None else dict(parent.dims)
            changed = [
                self._put(table, lane, manifest.version, tensors, dims, transaction) for table in range(len(TABLES))
            ]
            transaction.put(key, np.concatenate(changed, axis=1).tobytes(), db=self._changes)
            self._put_dense(manifest.version, tensors, parent, transaction)
            serial = int.from_bytes(_stored(transaction, b"serial", self.meta) or b"", "big") + 1
            transaction.put(b"serial", _u64(serial), db=self.meta)
            record = Served(
                version=manifest.version,
                epoch=manifest.epoch,
                parent=manifest.parent,
                serial=serial,
                lane=lane,
                visible=((manifest.version, manifest.version),)
                if parent is None
                else extend(parent.visible, parent.version, manifest.version),
                dims=dims,
                created_at_ms=manifest.created_at_ms,
                event_time_ms=manifest.event_time_ms,
                applied_at_ms=now_ms,
                spec=manifest.spec,
                program=manifest.program,
                salt=manifest.salt,
                mask_generation=manifest.mask_generation,
                sources={str(source): int(following) for source, following in manifest.sources},
            )
            transaction.put(key, record.to_json(), db=self.versions)
            pointer = _stored(transaction, b"served", self.meta)
            if follow or (pointer is not None and pointer[:8] == key):
                self._point(manifest.version, transaction)
        return True

    def _put(
        self, table: int, lane: int, version: int, tensors: Tensors, dims: dict[str, int], transaction: lmdb.Transaction
    ) -> NDArray[np.uint64]:
        name = TABLES[table]
        ids = np.asarray(tensors.get(f"{name}.ids", ()), np.uint64)
        removed = np.asarray(tensors.get(f"{name}.removed", ()), np.uint64)
        blobs: list[bytes] = []
        if len(ids):
            rows = np.ascontiguousarray(tensors[f"{name}.rows"], "<f4")
            dims[name] = rows.shape[1]
            order = np.argsort(ids, kind="stable")
            ids, size, blob = ids[order], 4 * rows.shape[1], rows[order].tobytes()
            blobs = [blob[at : at + size] for at in range(0, len(blob), size)]
        every = np.concatenate((ids, removed))
        keys = row_keys(lane, table, every, version).tobytes()
        pairs = zip(
            (keys[at : at + 17] for at in range(0, len(keys), 17)), [*blobs, *[b""] * len(removed)], strict=True
        )
        transaction.cursor(self.rows).putmulti(pairs)
        return np.stack((np.full(len(every), table, np.uint64), every))

    def _put_dense(self, version: int, tensors: Tensors, parent: Served | None, transaction: lmdb.Transaction) -> None:
        dense = {name[6:]: np.ascontiguousarray(value) for name, value in tensors.items() if name.startswith("dense.")}
        popular = tensors.get("popular")
        if parent is not None:
            dense = load_tensors(_must(transaction, parent.version, self.dense_db)) | dense
            if popular is None:
                popular = np.frombuffer(_must(transaction, parent.version, self.popular_db), "<u8")
        transaction.put(_u64(version), save_tensors(dense), db=self.dense_db)
        transaction.put(
            _u64(version), np.asarray(() if popular is None else popular, "<u8").tobytes(), db=self.popular_db
        )

    def _point(self, version: int, transaction: lmdb.Transaction) -> None:
        record = Served.parse(_must(transaction, version, self.versions))
        transaction.put(b"served", _u64(version) + _u64(record.serial), db=self.meta)

    def serve(self, version: int) -> None:
        """Moves the pointer: from now on answers use `version`.

        Raises:
            UnknownVersion: It is not applied here.
        """
        self.steer({}, version)

    def steer(self, notes: Mapping[str, bytes], version: int | None = None) -> None:
        """Stores the owner's `notes` and, with `version`, moves the pointer, both at the same moment.

        Raises:
            UnknownVersion: `version` is not applied here; nothing was changed.
        """
        with self._writing() as transaction:
            for name, value in notes.items():
                transaction.put(b"note:" + name.encode(), value, db=self.meta)
            if version is not None:
                self._point(version, transaction)

    def _free_lane(self, transaction: lmdb.Transaction) -> int:
        taken = {Served.parse(record).lane for _, record in transaction.cursor(self.versions)}
        for lane in range(LANES):
            if lane not in taken and not self._lane_has_rows(lane, transaction):
                return lane
        raise StoreError(
            f"all {LANES} lanes of {self.path} hold versions; lower serving.keep_s so that old ones are swept"
        )

    def _lane_has_rows(self, lane: int, transaction: lmdb.Transaction) -> bool:
        cursor = transaction.cursor(self.rows)
        return bool(cursor.set_range(bytes([lane << 3]))) and cursor.key()[0] >> 3 == lane

    def sweep(self, horizon_ms: int, keep: Sequence[int] = (), at_most: int = 200) -> int:
        """Forgets versions applied before `horizon_ms`, and the rows that only they could see.

        The served version and those of `keep` stay.

        Args:
            horizon_ms: Versions applied at or after this time stay.
            keep: Versions that stay whatever their age.
            at_most: How many versions one call forgets, so that it stays short.

        Returns:
            How many versions were forgotten.
        """
        with self._writing() as transaction:
            records = [Served.parse(record) for _, record in transaction.cursor(self.versions)]
            pointer = _stored(transaction, b"served", self.meta)
            kept = {*keep, 0 if pointer is None else int.from_bytes(pointer[:8], "big")}
            retired = [r for r in records if r.applied_at_ms < horizon_ms and r.version not in kept][:at_most]
            gone = {record.version for record in retired}
            lanes: dict[int, dict[int, Visible]] = {}
            for record in records:
                if record.version not in gone:
                    lanes.setdefault(record.lane, {})[record.version] = record.visible
            floors = self._floors(transaction)
            for record in retired:
                if record.lane in lanes:
                    floor = self._sweep_rows(record, lanes[record.lane], transaction)
                    floors[str(record.lane)] = max(floors.get(str(record.lane), 0), floor)
                for db in (self.versions, self.dense_db, self.popular_db, self._changes):
                    transaction.delete(_u64(record.version), db=db)
            self._delete_dead_lanes(set(lanes), floors, transaction)
            transaction.put(b"floor", json.dumps(floors).encode(), db=self.meta)
        return len(retired)

    def _sweep_rows(self, record: Served, retained: Mapping[int, Visible], transaction: lmdb.Transaction) -> int:
        runs = segments(retained)
        floor = 0
        cursor = transaction.cursor(self.rows)
        changes = np.frombuffer(_must(transaction, record.version, self._changes), np.uint64).reshape(2, -1)
        for table, identity in zip(*changes.tolist(), strict=True):
            stem = bytes([record.lane << 3 | table]) + _u64(identity)
            entries: list[tuple[int, bool]] = []
            found = cursor.set_range(stem)
            while found and cursor.key()[:9] == stem:
                entries.append((_TOP - int.from_bytes(cursor.key()[9:], "big"), not cursor.value()))
                found = cursor.next()
            kept = needed([version for version, _ in entries], runs)
            for version, empty in reversed(entries):
                # A tombstone with nothing older under it says nothing; but no version up to it may come back to this lane.
                if version in kept and not empty:
                    break
                if version in kept:
                    floor = max(floor, version)
                    kept.discard(version)
            for version, _ in entries:
                if version not in kept:
                    transaction.delete(stem + _u64(_TOP - version), db=self.rows)
        return floor

    def _delete_dead_lanes(self, alive: set[int], floors: dict[str, int], transaction: lmdb.Transaction) -> None:
        budget = LANE_ROWS_PER_SWEEP
        for lane in set(range(LANES)) - alive:
            floors.pop(str(lane), None)
            cursor = transaction.cursor(self.rows)
            cursor.set_range(bytes([lane << 3]))
            while budget and (key := cursor.key()) and key[0] >> 3 == lane:
                cursor.delete()
                budget -= 1

    def entries(self) -> int:
        """How many row entries are stored, over all versions."""
        with self._environment.begin() as transaction:
            return int(transaction.stat(self.rows)["entries"])

    def clear_stale_readers(self) -> int:
        """Frees the slots of readers whose process died; returns how many."""
        return int(self._environment.reader_check())

    def sync(self) -> None:
        """Makes everything applied so far durable.

        Raises:
            StoreFull: The disk refused.
        """
        try:
            self._environment.sync(True)
        except (lmdb.Error, OSError) as error:
            raise StoreFull(
                f"the row store {self.path} could not be synced ({error}); free disk space and start again"
            ) from None

    def close(self) -> None:
        """Syncs and closes; call it once no reader is open.

        Raises:
            StoreFull: The disk refused; the store is closed without the mark, as after a kill.
        """
        try:
            if not self._readonly:
                self.sync()
        finally:
            self._environment.close()
        if not self._readonly:
            try:
                mark.write(self._mark, clean=True)
            except OSError as error:
                raise StoreFull(
                    f"the row store {self.path} could not be closed in order ({error}); free disk space"
                ) from None
