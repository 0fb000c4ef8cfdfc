"""Removes erased users from a store of histories: their events and waiting rows at once, the freed pages soon after.

LMDB keeps deleted data on free pages of its file until they are reused. So the
store is compacted, at once if that was not done recently. Copying the whole file
for each erasure would be expensive.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace

import numpy as np

from state.features.erased import Erased
from state.history.gone import Gone
from state.history.store import HistoryStore
from state.history.waiting import WaitingRows, place_of
from state.positions import Range, Source

FORGOTTEN = "erased"  # name of the store's extra
PAGES_MS = 600_000
"""Least time between two compactions of a store."""


@dataclass(frozen=True)
class ForgottenUsers:
    """How far a store has applied erasures.

    Attributes:
        through: The last erasure whose users' records are removed.
        pages: The last erasure whose users' records are also gone from free pages.
        paged_ms: When the store was last compacted, wall clock.
    """

    through: int = 0
    pages: int = 0
    paged_ms: int = 0

    def due_ms(self) -> int | None:
        """When the store is due for compaction; None if it is not needed."""
        return None if self.pages >= self.through else self.paged_ms + PAGES_MS


def forgotten(store: HistoryStore) -> ForgottenUsers:
    """The progress that the store has recorded."""
    stored = store.extra(FORGOTTEN)
    return ForgottenUsers() if stored is None else ForgottenUsers(**json.loads(stored))


def forget(store: HistoryStore, erased: Erased) -> ForgottenUsers:
    """Removes the data of users erased since the last call, in one commit.

    Waiting rows are checked every time, since a rewind may have restored some.

    Args:
        store: The store; only its writer may call.
        erased: All erasures.

    Raises:
        CorruptStore: A waiting row cannot be read.
        StoreFull: Nothing was changed.
    """
    before = forgotten(store)
    if not erased:
        return before
    waiting, dropped = _waiting(store, erased)
    now = replace(before, through=max(before.through, erased.last))
    if waiting or now != before:
        extra = {FORGOTTEN: json.dumps(asdict(now)).encode()}
        store.forget(Gone(erased.after(before.through), waiting, dropped, extra))
    return now


def write_anew(store: HistoryStore, now_ms: int) -> ForgottenUsers:
    """Compacts the store if that is due, so that free pages hold nothing of erased users.

    Args:
        store: The store; only its writer may call, while no other thread of this process reads it.
        now_ms: Wall clock.

    Raises:
        StoreFull: There is no room for both files; the store is unchanged.
    """
    told = forgotten(store)
    due_ms = told.due_ms()
    if due_ms is None or now_ms < due_ms:
        return told
    store.compact()
    told = ForgottenUsers(told.through, told.through, now_ms)
    store.forget(Gone(Erased.NOBODY, extra={FORGOTTEN: json.dumps(asdict(told)).encode()}))
    return told


def _waiting(store: HistoryStore, erased: Erased) -> tuple[list[bytes], list[Range]]:
    """The keys of erased users' waiting rows, and their number per source, as ranges without positions."""
    rows = WaitingRows(store)
    if rows.format is None:
        return [], []
    keys, values = [], []
    for key, value in store.waiting():
        keys.append(key)
        values.append(value)
    if not keys:
        return [], []
    places = [place_of(key) for key in keys]
    sources = sorted({source for source, _ in places})
    number = {source: at for at, source in enumerate(sources)}
    gone = erased.rows(
        rows.format.unpack(values)["user"],
        np.array([number[source] for source, _ in places], np.uint16),
        np.array([offset for _, offset in places], np.int64),
        [Range(source, 0, 0) for source in sources],
    )
    theirs = np.flatnonzero(gone).tolist()
    counted: Counter[Source] = Counter(places[at][0] for at in theirs)
    ends = store.positions()
    return [keys[at] for at in theirs], [Range(one, ends[one], ends[one], dropped=n) for one, n in counted.items()]
