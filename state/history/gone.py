"""What a store of histories takes away of erased users, and how that is written: one transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lmdb

from state.features.erased import Erased
from state.history import chunks
from state.history.chunks import prefix_of
from state.history.counts import move
from state.positions import Range


@dataclass(frozen=True, slots=True)
class Gone:
    """What goes, at once.

    Attributes:
        erased: The erasures whose users' events go.
        waiting: Keys of rows that wait no more.
        dropped: Of their sources, how many those are: ranges without positions.
        extra: Values of the owner's, replaced.
    """

    erased: Erased
    waiting: Sequence[bytes] = ()
    dropped: Sequence[Range] = ()
    extra: Mapping[str, bytes] = field(default_factory=dict)


def take_away(transaction: lmdb.Transaction, databases: Mapping[str, Any], gone: Gone, history: int) -> None:
    """Does so in a transaction of a store with these databases, which keeps `history` events of a user."""
    meta, cursor = databases["meta"], transaction.cursor(db=databases["chunks"])
    users = int(transaction.get(b"users", b"0", db=meta))
    # 1. Histories: what the user did later stays, as that of a new one.
    for user in gone.erased.users:
        stored = chunks.events_in(chunks.read(cursor, prefix_of(user), history)[0])
        kept = stored[~gone.erased.events(stored, user)]
        users -= len(stored) > 0 and len(kept) == 0
        if len(kept) < len(stored):
            chunks.replace_all(cursor, prefix_of(user), kept, len(kept))
    transaction.put(b"users", str(users).encode(), db=meta)
    # 2. Rows that wait, and the counts of them.
    for key in gone.waiting:
        transaction.delete(key, db=databases["waiting"])
    for part in gone.dropped:
        move(transaction.cursor(db=meta), part, "the histories")
    # 3. The owner's values.
    for name, value in gone.extra.items():
        transaction.put(b"x:" + name.encode(), value, db=meta)
