"""What a reader of the row store sees: one moment, and in it each version as it was applied.

The version is inverted in the keys, so that one range seek a row finds the
newest entry not above the version that is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors

from state.errors import UnknownVersion
from state.rows.keys import TOP, VERSION_BYTES, stem, u64
from state.rows.served import Served
from state.rows.tables import CODES

Databases = Mapping[str, lmdb._Database]


@dataclass
class LastServed:
    """The record that was parsed last, which most readers ask for again.

    Attributes:
        pointer: Version and serial that the store's pointer named then.
        record: The version's.
    """

    pointer: bytes = b""
    record: Served | None = None


def stored(transaction: lmdb.Transaction, key: bytes, database: lmdb._Database) -> bytes | None:
    """What is under `key`; None where nothing is."""
    value = transaction.get(key, db=database)
    return None if value is None else bytes(value)


def required(transaction: lmdb.Transaction, version: int, database: lmdb._Database) -> bytes:
    """What a database has of an applied version.

    Raises:
        UnknownVersion: It is not applied.
    """
    value = stored(transaction, u64(version), database)
    if value is None:
        raise UnknownVersion(f"version {version} is not applied here", "apply it before it is served")
    return value


class RowReader:
    """One read transaction: everything it returns is of one moment. Use it in one thread.

    Args:
        transaction: The transaction.
        databases: The store's, by name.
        last: What the store's readers share.
    """

    def __init__(self, transaction: lmdb.Transaction, databases: Databases, last: LastServed) -> None:
        self._transaction = transaction
        self._databases = databases
        self._last = last
        self._cursor = transaction.cursor(databases["rows"])

    def served(self) -> Served | None:
        """The version that answers use; None before the first."""
        pointer = stored(self._transaction, b"served", self._databases["meta"])
        if pointer is None:
            return None
        if self._last.pointer != pointer:
            version = int.from_bytes(pointer[:8], "big")
            self._last.record = Served.parse(required(self._transaction, version, self._databases["versions"]))
            self._last.pointer = pointer
        return self._last.record

    def before(self) -> int | None:
        """The version that answers used before the one of now; None before the second."""
        version = stored(self._transaction, b"before", self._databases["meta"])
        return None if version is None else int.from_bytes(version, "big")

    def note(self, name: str) -> bytes | None:
        """What `steer` last stored under `name`."""
        return stored(self._transaction, b"note:" + name.encode(), self._databases["meta"])

    def version(self, version: int) -> Served | None:
        """An applied version, or None."""
        record = stored(self._transaction, u64(version), self._databases["versions"])
        return None if record is None else Served.parse(record)

    def versions(self) -> list[Served]:
        """All applied versions, oldest first."""
        return [Served.parse(record) for _, record in self._transaction.cursor(self._databases["versions"])]

    def get(self, table: str, ids: Sequence[int], at: Served) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Rows of `ids` as version `at` has them.

        Args:
            table: Its name.
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
        start = stem(at.lane, CODES[table], identity)
        for lowest, highest in at.visible:
            if not cursor.set_range(start + (TOP - highest).to_bytes(8, "big")):
                return None
            key = cursor.key()
            if key[: len(start)] != start:
                return None
            if TOP - int.from_bytes(key[-VERSION_BYTES:], "big") >= lowest:
                return bytes(cursor.value()) or None
            # The entry is of an abandoned version or of an older interval: seek again from the next one.
        return None

    def dense(self, version: int) -> dict[str, NDArray[Any]]:
        """The dense tensors of an applied version, by their names without `dense.`."""
        return load_tensors(required(self._transaction, version, self._databases["dense"]))

    def popular(self, version: int) -> NDArray[np.uint64]:
        """`[P]` uint64: the popular categories of an applied version, most popular first."""
        return np.frombuffer(required(self._transaction, version, self._databases["popular"]), "<u8").astype(np.uint64)
