"""Reads the row store: a consistent snapshot with each applied version.

The version is inverted in the keys. So one range seek per row finds the newest entry at or below the requested version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lmdb
import msgspec
import numpy as np
from numpy.typing import NDArray

from state.disk import documents
from state.errors import UnknownVersion
from state.registry.manifest import Manifest, Visible, extend, sees
from state.registry.tensor_files import load
from state.rows.tables import CODES, TOP, VERSION_BYTES, row_prefix, u64, version_of


@dataclass(frozen=True)
class Served:
    """One applied version.

    Attributes:
        serial: Number of the application; a version that is applied again gets another one.
        lane: Lane of the row store with its rows.
        visible: The entries of the lane that it sees, newest interval first.
        dims: Width of each table's rows.
        sources: Next offset of each source that it was trained on, by the source's text form.
        erased: The last erasure that it has applied.
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
    erased: int = 0

    @classmethod
    def parse(cls, record: bytes | memoryview) -> Served:
        """Parses the record that `to_json` wrote."""
        return documents.decode(record, cls)

    def to_json(self) -> bytes:
        """Encodes this record as a JSON object."""
        return msgspec.json.encode(self)

    @classmethod
    def of(
        cls, manifest: Manifest, parent: Served | None, serial: int, lane: int, dims: Mapping[str, int], now_ms: int
    ) -> Served:
        """Builds the record of a version when it is applied; a base, which has no parent, sees only its own rows."""
        version = manifest.version
        return cls(
            version=version,
            epoch=manifest.epoch,
            parent=manifest.parent,
            serial=serial,
            lane=lane,
            visible=((version, version),) if parent is None else joined(parent, manifest),
            dims=dims,
            created_at_ms=manifest.created_at_ms,
            event_time_ms=manifest.event_time_ms,
            applied_at_ms=now_ms,
            spec=manifest.spec,
            program=manifest.program,
            salt=manifest.salt,
            mask_generation=manifest.mask_generation,
            sources={str(source): int(following) for source, following in manifest.sources},
            erased=manifest.erased,
        )


def joined(parent: Served, manifest: Manifest) -> Visible:
    """The versions that a delta sees when it is applied onto `parent`.

    Recent versions between two durable ones are on one branch with both. The stored ones are ancestors of the newer
    durable version, so one interval contains them all. This saves seeks: a reader seeks once per interval.
    """
    (low, high), *older = parent.visible
    if high == parent.version and any(first <= high and manifest.version <= last for first, last in manifest.visible):
        return ((low, manifest.version), *older)
    return extend(parent.visible, parent.version, manifest.version)


Databases = Mapping[str, lmdb._Database]


@dataclass
class LastServed:
    """Cache of the last parsed version record, which most readers request again, and of the pointer to it."""

    pointer: bytes = b""
    record: Served | None = None


def stored(transaction: lmdb.Transaction, key: bytes, database: lmdb._Database) -> bytes | None:
    """The value under `key`; None if there is none."""
    value = transaction.get(key, db=database)
    return None if value is None else bytes(value)


def required(transaction: lmdb.Transaction, version: int, database: lmdb._Database) -> bytes:
    """The value that a database has for an applied version."""
    value = stored(transaction, u64(version), database)
    if value is None:
        raise UnknownVersion(f"version {version} is not applied here", "apply it before it is served")
    return value


class RowReader:
    """One read transaction: all its results are of one snapshot. Not thread-safe.

    Readers of a store share `last`.
    """

    def __init__(self, transaction: lmdb.Transaction, databases: Databases, last: LastServed) -> None:
        self._transaction = transaction
        self._databases = databases
        self._last = last
        self._cursor = transaction.cursor(databases["rows"])

    def served(self) -> Served | None:
        """The version that serving uses; None before the first."""
        pointer = stored(self._transaction, b"served", self._databases["meta"])
        if pointer is None:
            return None
        if self._last.pointer != pointer:
            version = int.from_bytes(pointer[:8], "big")
            self._last.record = Served.parse(required(self._transaction, version, self._databases["versions"]))
            self._last.pointer = pointer
        return self._last.record

    def before(self) -> int | None:
        """The version that serving used before the current one; None before the second."""
        version = stored(self._transaction, b"before", self._databases["meta"])
        return None if version is None else int.from_bytes(version, "big")

    def note(self, name: str) -> bytes | None:
        """The value that `steer` last stored under `name`; None if there is none."""
        return stored(self._transaction, b"note:" + name.encode(), self._databases["meta"])

    def version(self, version: int) -> Served | None:
        """An applied version, or None."""
        record = stored(self._transaction, u64(version), self._databases["versions"])
        return None if record is None else Served.parse(record)

    def versions(self) -> list[Served]:
        """All applied versions, oldest first."""
        return [Served.parse(record) for _, record in self._transaction.cursor(self._databases["versions"])]

    def get(self, table: str, ids: Sequence[int], at: Served) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Rows of `ids` at version `at`.

        Returns:
            `[n, dim]` float32, zeros where missing, and `[n]` bool, whether each id has a row.
        """
        dim = at.dims.get(table, 0)
        values = [self.row(table, identity, at) for identity in ids]
        missing = bytes(4 * dim)
        rows = np.frombuffer(b"".join([row or missing for row in values]), np.float32).reshape(len(values), dim)
        return rows, np.array([row is not None for row in values], np.bool_)

    def row(self, table: str, identity: int, at: Served) -> bytes | None:
        """The bytes of one row, `[dim]` float32, at version `at`; None if it has none."""
        cursor = self._cursor
        start = row_prefix(at.lane, CODES[table], identity)
        for lowest, highest in at.visible:
            if not cursor.set_range(start + (TOP - highest).to_bytes(8, "big")):
                return None
            key = cursor.key()
            if key[: len(start)] != start:
                return None
            if TOP - int.from_bytes(key[-VERSION_BYTES:], "big") >= lowest:
                return bytes(cursor.value()) or None
            # The entry is of an abandoned version or of an older interval. Seek again from the next interval.
        return None

    def rows_from(
        self, table: str, start: int, most: int, at: Served
    ) -> tuple[NDArray[np.uint64], NDArray[np.float32], int | None]:
        """`[k]` uint64 ids and `[k, dim]` float32 rows of a table at version `at`, from id `start` on, by ascending id.

        It checks at most `most` ids, including those without a row at `at`. It also returns the id at which to
        continue; None at the end.
        """
        code, dim, following = CODES[table], at.dims.get(table, 0), None
        cursor, values_by_id = self._transaction.cursor(self._databases["rows"]), dict[int, bytes | None]()
        has_entry = bool(cursor.set_range(row_prefix(at.lane, code, start)))
        while has_entry:
            key = bytes(cursor.key())
            if key[0] != at.lane << 3 | code:
                break
            identity = int.from_bytes(key[1:-VERSION_BYTES], "big")
            if values_by_id.get(identity) is None:
                if identity not in values_by_id and len(values_by_id) >= most:
                    following = identity
                    break
                values_by_id[identity] = bytes(cursor.value()) if sees(at.visible, version_of(key)) else None
            has_entry = cursor.next()
        rows = {identity: row for identity, row in values_by_id.items() if row}
        values = np.frombuffer(b"".join(rows.values()), np.float32).reshape(len(rows), dim)
        return np.array([*rows], np.uint64), values, following

    def changed(self, table: str, since: Served, at: Served) -> NDArray[np.uint64] | None:
        """The ids of a table's rows that may differ between version `at` and an earlier one, `[k]` uint64, each once.

        Returns None if they are unknown: `at` does not continue from `since`, or `since` is no longer stored.
        """
        if since.serial == at.serial:
            return np.empty(0, np.uint64)
        lowest, highest = at.visible[0]
        if since.lane != at.lane or not lowest <= since.version <= highest or self.version(since.version) is None:
            return None
        parts, cursor = [np.empty(0, np.uint64)], self._transaction.cursor(self._databases["changes"])
        has_entry = bool(cursor.set_range(u64(since.version + 1)))
        while has_entry and bytes(cursor.key()) <= u64(at.version):
            tables, ids = np.frombuffer(bytes(cursor.value()), np.uint64).reshape(2, -1)
            parts.append(ids[tables == CODES[table]])
            has_entry = cursor.next()
        return np.unique(np.concatenate(parts))

    def dense(self, version: int) -> dict[str, NDArray[Any]]:
        """The dense tensors of an applied version, by name without `dense.`, with those of churn and of item scores."""
        return load(required(self._transaction, version, self._databases["dense"]))

    def popular(self, version: int) -> NDArray[np.uint64]:
        """`[P]` uint64: the popular categories of an applied version, most popular first."""
        return np.frombuffer(required(self._transaction, version, self._databases["popular"]), "<u8").astype(np.uint64)
