"""Lets a store of histories forget erased users: their events and rows that wait at once, the pages they lay on soon after.

What LMDB deletes stays on pages of its file until they are used again. So the
store is written anew without them, at once where that was not done lately:
a copy of the whole file is dear where erasures come one by one.
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
"""Between two times that a store is written anew."""


@dataclass(frozen=True)
class ForgottenUsers:
    """How far a store has forgotten.

    Attributes:
        through: The last erasure whose users' records are gone.
        pages: Likewise, also from free pages.
        paged_ms: When it was last written anew, wall clock.
    """

    through: int = 0
    pages: int = 0
    paged_ms: int = 0

    def due_ms(self) -> int | None:
        """From when on the store is to be written anew; None where it need not be."""
        return None if self.pages >= self.through else self.paged_ms + PAGES_MS


def forgotten(store: HistoryStore) -> ForgottenUsers:
    """How far the store says that it has forgotten."""
    stored = store.extra(FORGOTTEN)
    return ForgottenUsers() if stored is None else ForgottenUsers(**json.loads(stored))


def forget(store: HistoryStore, erased: Erased) -> ForgottenUsers:
    """Takes away what the store has of users who were erased since it last did so; it is gone when this returns.

    Rows that wait are looked at again each time: going back may have brought some.

    Args:
        store: Its writer calls.
        erased: All erasures.

    Raises:
        CorruptStore: A row that waits cannot be read.
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
    """Writes the store anew where that is due, so that free pages have nothing of erased users.

    Args:
        store: Its writer calls; nobody else reads it in this process.
        now_ms: Wall clock.

    Raises:
        StoreFull: There is no room for both files; the store is as it was.
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
    """The keys of rows of erased users that wait, and by source how many they are."""
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
