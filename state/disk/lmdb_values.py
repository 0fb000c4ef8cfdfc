"""Helpers for LMDB: the open databases of a file, reading and writing several values, and the space that they use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import lmdb


class OpenDatabases(NamedTuple):
    """A file and its open databases. A reader takes both together, since a store may move.

    Attributes:
        env: The LMDB environment of the file.
        databases: Database handles by name.
    """

    env: Any
    databases: Mapping[str, Any]

    def begin(self, name: str) -> Any:
        """Begins a read `lmdb.Transaction` with this default database; it may read the others by their handles."""
        return self.env.begin(db=self.databases[name])


def put_all(transaction: lmdb.Transaction, database: Any, values: Mapping[bytes, bytes | None]) -> None:
    """Writes values by key; None deletes the key."""
    for key, value in values.items():
        if value is None:
            transaction.delete(key, db=database)
        else:
            transaction.put(key, value, db=database)


def keys_with(cursor: lmdb.Cursor, prefix: bytes, start: bytes, limit: int) -> list[tuple[bytes, bytes]]:
    """The first `limit` entries from key `start` on whose key begins with `prefix`, as (key, value)."""
    found: list[tuple[bytes, bytes]] = []
    if cursor.set_range(start):
        for key, value in cursor:
            if len(found) == limit or not bytes(key).startswith(prefix):
                break
            found.append((bytes(key), bytes(value)))
    return found


def pages_bytes(stat: Mapping[str, Any]) -> int:
    """The size of the pages that a database uses, from LMDB's statistics.

    >>> pages_bytes({"psize": 4096, "branch_pages": 1, "leaf_pages": 3, "overflow_pages": 0})
    16384
    """
    return int(stat["psize"] * (stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]))
