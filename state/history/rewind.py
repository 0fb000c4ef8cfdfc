"""What a store of histories gives back when it goes back to an earlier position, and how that is written.

A reader of the training log that goes back, the stream as well as each serving
host, looks at the log in two directions:

1. `Since`: forward from the place gone back to. Who gained events since, what
   became of the positions, which impressions stopped waiting.
2. `Before`: backward from that place, for what the store lacks. A history keeps
   the last N events, so of a user who gained some since then the oldest of
   that time are gone; and so are impressions whose wait has ended.

What both find is a `Rewind`, which is one transaction of the store.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from state.disk.lmdb_values import put_all
from state.features.spec import Events
from state.history import chunks
from state.history.chunks import prefix_of
from state.history.counts import Counts, key_of
from state.history.since import Since
from state.positions import Source


@dataclass(frozen=True, slots=True)
class Rewind:
    """What a store gives back, at once.

    Attributes:
        marks: The next offset of each source gone back to; events from there on go, and sources without one.
        gained: By user the events gained since then.
        rebuilt: Histories at that place of users whose own are not enough any more.
        counts: Of each source that moves; None for one that is not known any more.
        extra: Values of the owner's, replaced; None takes one away.
        waiting: Rows that wait again, by key; None for one that does not.
    """

    marks: Mapping[Source, int]
    gained: Mapping[int, int] = field(default_factory=dict)
    rebuilt: Mapping[int, Events] = field(default_factory=dict)
    counts: Mapping[Source, Counts | None] = field(default_factory=dict)
    extra: Mapping[str, bytes | None] = field(default_factory=dict)
    waiting: Mapping[bytes, bytes | None] = field(default_factory=dict)


def kept(history: Events, user: int, marks: Mapping[Source, int], sources: Iterable[Source]) -> NDArray[np.bool_]:
    """Which events of a history (`[m]` bool) lie before the marks.

    Args:
        history: `[m]` EVENT.
        user: Whose.
        marks: The next offset of each source; all events of one without are behind it.
        sources: Those that go back; events of others stay.
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
    """By user how many of the latest events before `marks` a history must have, of users whose stored one has fewer."""
    cursor = transaction.cursor(db=databases["chunks"])
    sources, found = since.sources, dict[int, int]()
    for user, gained in since.gained.items():
        joined, total = chunks.read(cursor, prefix_of(user), history)
        # Who has gained more than there ever was, was taken out of the store meanwhile: nothing is known of before.
        must = history if gained > total else min(history, total - gained)
        if must > int(kept(chunks.events_in(joined), user, marks, sources).sum()):
            found[user] = must
    return found


def write_back(transaction: lmdb.Transaction, databases: Mapping[str, Any], back: Rewind, history: int) -> None:
    """Writes a rewind in a transaction of a store with these databases, which keeps `history` events of a user."""
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
    # 3. The owner's values, and rows that wait.
    put_all(transaction, meta, {b"x:" + name.encode(): value for name, value in back.extra.items()})
    put_all(transaction, databases["waiting"], back.waiting)
