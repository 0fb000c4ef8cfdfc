"""Rewinds a store of histories to an earlier position: what changes, and how that is written.

A follower of the training log that rewinds, the stream as well as each serving
host, reads the log in two directions:

1. `Since`: forward from the rewind position. It finds the users that gained events
   since, the outcomes of the positions, and the impressions that stopped waiting.
2. `Before`: backward from that position, for what the store lacks. A history keeps
   the last N events, so a user who gained events since has lost as many of the
   oldest ones. Impressions whose wait has ended are missing too.

Both results form a `Rewind`, which is one transaction of the store.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from state.disk.lmdb_store import put_all
from state.features.spec import Events
from state.history import chunks
from state.history.chunks import prefix_of
from state.history.counts import Counts, key_of
from state.history.since import Since
from state.positions import Source


@dataclass(frozen=True, slots=True)
class Rewind:
    """The changes of one rewind, written in one transaction.

    Attributes:
        marks: The next offset of each source at the rewind position. Later events are removed, and all events of
            sources without an entry.
        gained: User -> how many events the user gained since then.
        rebuilt: The histories at that position of users whose stored history is too short.
        counts: The counts of each source that moves; None for a source that was unknown then.
        extra: Extras to replace; None removes one.
        waiting: Rows that wait again, by key; None removes one.
    """

    marks: Mapping[Source, int]
    gained: Mapping[int, int] = field(default_factory=dict)
    rebuilt: Mapping[int, Events] = field(default_factory=dict)
    counts: Mapping[Source, Counts | None] = field(default_factory=dict)
    extra: Mapping[str, bytes | None] = field(default_factory=dict)
    waiting: Mapping[bytes, bytes | None] = field(default_factory=dict)


def kept(history: Events, user: int, marks: Mapping[Source, int], sources: Iterable[Source]) -> NDArray[np.bool_]:
    """Which events of a history are before the marks, `[m]` bool.

    Args:
        history: `[m]` EVENT.
        user: The user.
        marks: The next offset of each source; all events of a source without one count as after it.
        sources: The sources that rewind; events of other sources stay.
    """
    stays = np.ones(len(history), np.bool_)
    for source in sources:
        if not source.has(user):
            continue
        theirs = (history["topic"] == source.topic) & (history["partition"] == source.partition)
        stays &= ~(theirs & (history["offset"] >= marks.get(source, 0)))
    return stays


def lacking(
    transaction: lmdb.Transaction, databases: Mapping[str, Any], since: Since, marks: Mapping[Source, int], history: int
) -> dict[int, int]:
    """User -> how many of the latest events before `marks` are needed, for users whose stored history has fewer."""
    cursor = transaction.cursor(db=databases["chunks"])
    sources, found = since.sources, dict[int, int]()
    for user, gained in since.gained.items():
        joined, total = chunks.read(cursor, prefix_of(user), history)
        # A user who gained more events than the stored total was evicted meanwhile: the earlier events are unknown.
        must = history if gained > total else min(history, total - gained)
        if must > int(kept(chunks.events_in(joined), user, marks, sources).sum()):
            found[user] = must
    return found


def write_back(transaction: lmdb.Transaction, databases: Mapping[str, Any], back: Rewind, history: int) -> None:
    """Writes a rewind in a transaction of a store with these databases, which keeps `history` events per user."""
    meta, sources = databases["meta"], list(back.counts)
    cursor = transaction.cursor(db=databases["chunks"])
    users = int(transaction.get(b"users", b"0", db=meta))
    # 1. Histories.
    for user, gained in back.gained.items():
        joined, total = chunks.read(cursor, prefix_of(user), history)
        stored = chunks.events_in(joined)
        events = stored[kept(stored, user, back.marks, sources)]
        rebuilt = back.rebuilt.get(user)
        if rebuilt is not None and len(rebuilt) > len(events):
            events = rebuilt
        users += (len(events) > 0) - (len(stored) > 0)
        chunks.replace_all(cursor, prefix_of(user), events, max(total - gained, len(events)))
    transaction.put(b"users", str(users).encode(), db=meta)
    # 2. Positions.
    for source, counted in back.counts.items():
        if counted is None:
            transaction.delete(key_of(source), db=meta)
        else:
            transaction.put(key_of(source), json.dumps(counted).encode(), db=meta)
    # 3. Extras, and waiting rows.
    put_all(transaction, meta, {b"x:" + name.encode(): value for name, value in back.extra.items()})
    put_all(transaction, databases["waiting"], back.waiting)
