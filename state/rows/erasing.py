"""What the row store deletes of erased users: every entry of before, in all lanes, whatever version still reads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import lmdb
import numpy as np
from numpy.typing import NDArray

from state.features.erased import Erased
from state.rows.keys import lane_of, stem, u64, version_of
from state.rows.served import Served
from state.rows.tables import CODES, OWN, TABLES

if TYPE_CHECKING:
    # Its kernels load a compiler, which commands do without.
    from state.ranking.crosses import Crosses

U64 = NDArray[np.uint64]


def erase(
    transaction: lmdb.Transaction,
    databases: Mapping[str, lmdb._Database],
    erased: Erased,
    crosses: Crosses,
    version: int | None = None,
) -> int:
    """Deletes what versions that have not taken erasures into account wrote of their users; returns how many entries.

    Answers at such a version leave these users' rows out anyway.

    Args:
        transaction: Of the store.
        databases: The store's, by name.
        erased: The erasures.
        crosses: With the columns of the settings.
        version: Only what this version wrote; None for all that is here, which is noted.
    """
    rows, deleted = databases["rows"], 0
    records = [Served.parse(record) for _, record in transaction.cursor(databases["versions"])]
    known = [ids_in(transaction, rows, table) for table in ("item", "category", "context")]
    for one in erased:
        later = min((record.version for record in records if record.erased >= one.id), default=1 << 63)
        wrote = (0, later) if version is None else (version, version + 1)
        gone = dict.fromkeys(user_tables(records), one.users.ids)
        pairs = [crosses.of_user(user, *known) for user in one.users]
        gone["cross"] = np.concatenate([np.empty(0, np.uint64), *pairs])
        deleted += delete_entries(transaction, rows, gone, *wrote)
        before = [one_of.version for one_of in records if one_of.erased < one.id]
        changes = databases["changes"]
        _leave_out(transaction, changes, before if version is None else [version], np.concatenate([*gone.values()]))
    if version is None:
        transaction.put(b"erased", u64(erased.last), db=databases["meta"])
    return deleted


def _leave_out(transaction: lmdb.Transaction, changes: lmdb._Database, versions: Iterable[int], ids: U64) -> None:
    """Takes ids out of the lists of what versions changed: there is no entry to look at any more."""
    for version in versions:
        written = np.frombuffer(transaction.get(u64(version), b"", db=changes), np.uint64).reshape(2, -1)
        theirs = np.isin(written[1], ids)
        if theirs.any():
            transaction.put(u64(version), written[:, ~theirs].tobytes(), db=changes)


def user_tables(records: Iterable[Served]) -> set[str]:
    """The tables that may have rows of users: their own, and a ranker's own, in which no other id is a user's."""
    return {"user", *(name for record in records for name in record.dims if name not in TABLES)}


def ids_in(transaction: lmdb.Transaction, rows: lmdb._Database, table: str) -> U64:
    """The ids that have an entry in a table of every version, ascending."""
    cursor, found = transaction.cursor(rows), set[int]()
    for lane in _lanes(cursor):
        start = stem(lane, CODES[table], 0)[:1]
        if cursor.set_range(start):
            for key in cursor.iternext(values=False):
                if key[:1] != start:
                    break
                found.add(int.from_bytes(key[1:9], "big"))
    return np.array(sorted(found), np.uint64)


def delete_entries(
    transaction: lmdb.Transaction, rows: lmdb._Database, gone: Mapping[str, U64], first: int, after: int
) -> int:
    """Deletes the entries of ids, by table, that versions from `first` to before `after` wrote; returns how many."""
    cursor, deleted = transaction.cursor(rows), 0
    for lane in list(_lanes(cursor)):
        for table, ids in gone.items():
            for identity in ids.tolist():
                start = stem(lane, CODES[table], identity)
                found = cursor.set_range(start)
                while found and (key := bytes(cursor.key()))[: len(start)] == start:
                    if first <= version_of(key) < after:
                        found = cursor.delete() and bool(cursor.key())
                        deleted += 1
                    else:
                        found = cursor.next()
    return deleted


def _lanes(cursor: lmdb.Cursor) -> Iterator[int]:
    """The lanes that have entries, by seeks."""
    found = cursor.first()
    while found:
        lane = lane_of(bytes(cursor.key()))
        yield lane
        found = cursor.set_range(bytes([lane << 3 | OWN]) + b"\xff" * 21)
