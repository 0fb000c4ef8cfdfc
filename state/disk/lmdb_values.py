"""Values of a database in LMDB, read and changed several at once; and the space that a database takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lmdb


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
