"""The data of erased users that a store of histories removes in one transaction."""

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
    """What one transaction removes.

    Attributes:
        erased: The erasures whose users' events are removed.
        waiting: Keys of waiting rows to remove.
        dropped: The number of these rows per source, as ranges without positions.
        extra: Extras to replace.
    """

    erased: Erased
    waiting: Sequence[bytes] = ()
    dropped: Sequence[Range] = ()
    extra: Mapping[str, bytes] = field(default_factory=dict)


def take_away(transaction: lmdb.Transaction, databases: Mapping[str, Any], gone: Gone, history: int) -> None:
    """Removes `gone` in a transaction of a store with these databases, which keeps `history` events per user."""
    meta, cursor = databases["meta"], transaction.cursor(db=databases["chunks"])
    users = int(transaction.get(b"users", b"0", db=meta))
    # 1. Histories: later events of the user stay, as those of a new user.
    for user in gone.erased.users:
        stored = chunks.events_in(chunks.read(cursor, prefix_of(user), history)[0])
        kept = stored[~gone.erased.events(stored, user)]
        users -= len(stored) > 0 and len(kept) == 0
        if len(kept) < len(stored):
            chunks.replace_all(cursor, prefix_of(user), kept, len(kept))
    transaction.put(b"users", str(users).encode(), db=meta)
    # 2. Waiting rows and their counts.
    for key in gone.waiting:
        transaction.delete(key, db=databases["waiting"])
    for part in gone.dropped:
        move(transaction.cursor(db=meta), part, "the histories")
    # 3. Extras.
    for name, value in gone.extra.items():
        transaction.put(b"x:" + name.encode(), value, db=meta)
