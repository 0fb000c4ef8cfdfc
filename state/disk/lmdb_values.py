"""Databases of a file in LMDB, open together; values of one, read and changed several at once; and the space that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import lmdb


class OpenDatabases(NamedTuple):
    """A file and its databases, which go together: a reader takes both at once, for a store may move.

    Attributes:
        env: The file.
        databases: By name.
    """

    env: Any
    databases: Mapping[str, Any]

    def begin(self, name: str) -> Any:
        """An `lmdb.Transaction` that reads one database, or others by their handles here."""
        return self.env.begin(db=self.databases[name])


def put_all(transaction: lmdb.Transaction, database: Any, values: Mapping[bytes, bytes | None]) -> None:
    """Replaces values by key; None takes one away."""
    for key, value in values.items():
        if value is None:
            transaction.delete(key, db=database)
        else:
            transaction.put(key, value, db=database)


def keys_with(cursor: lmdb.Cursor, prefix: bytes, start: bytes, limit: int) -> list[tuple[bytes, bytes]]:
    """The first `limit` keys from `start` on that begin with `prefix`, each with its value."""
    found: list[tuple[bytes, bytes]] = []
    if cursor.set_range(start):
        for key, value in cursor:
            if len(found) == limit or not bytes(key).startswith(prefix):
                break
            found.append((bytes(key), bytes(value)))
    return found


def pages_bytes(stat: Mapping[str, Any]) -> int:
    """The size of the pages that a database has in use, by LMDB's figures.

    >>> pages_bytes({"psize": 4096, "branch_pages": 1, "leaf_pages": 3, "overflow_pages": 0})
    16384
    """
    return int(stat["psize"] * (stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]))
