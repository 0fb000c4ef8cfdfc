"""Forgets versions of the row store in one short transaction, and deletes row by row what they leave, a little at a time.

What a forgotten version wrote counts as written by the next one that stays.
So each retained version knows which rows have entries since the one before it,
and only those are looked at when that one is forgotten too.

What is left to look at is in memory: where the process ends before, the rows
keep an entry too many until they are looked at the next time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import lmdb
import numpy as np
from numpy.typing import NDArray

from state.registry.manifest import Visible
from state.rows.keys import LANES, stem, u64
from state.rows.lineage import Branch, branches_of
from state.rows.reader import Databases, required
from state.rows.served import Served
from state.rows.sweep import delete_dead_lanes, sweep_row

ROWS_AT_ONCE = 1000
ROWS_IN_TRANSACTION = 100
"""That are looked at: LMDB keeps as many pages as its largest transaction changed, and each row's lie apart."""
ROUNDS = 25
"""Within so many looks at ROWS_AT_ONCE or more what is left is looked at, so that it stays as much as versions leave in them."""
LANE_ROWS_AT_ONCE = 20 * ROWS_AT_ONCE  # what is deleted unread costs less

Changes = NDArray[np.uint64]
"""`[2, k]`: table and id of each row that versions wrote."""


class Forgotten(NamedTuple):
    """What one transaction did, which counts once it is committed.

    Attributes:
        versions: How many it forgot.
        left: By lane the rows to look at now.
        looked: How many rows of the first leftover it looked at.
        floors: By lane the version up to which none may come back there.
        dead: Whether a lane without versions may have rows; None where nobody looked.
    """

    versions: int = 0
    left: Sequence[tuple[int, Changes]] = ()
    looked: int = 0
    floors: Mapping[str, int] = {}
    dead: bool | None = None


class Forgetting:
    """The writer's memory of what is still to be looked at.

    Args:
        databases: The store's, by name.
    """

    def __init__(self, databases: Databases) -> None:
        self._databases = databases
        self._left: deque[tuple[int, Changes]] = deque()
        self._dead = True

    @property
    def left(self) -> bool:
        """Whether there is something to look at."""
        return bool(self._left) or self._dead

    @property
    def rows_left(self) -> int:
        """How many rows are to be looked at."""
        return sum(rows.shape[1] for _, rows in self._left)

    def took(self, done: Forgotten) -> None:
        """The transaction that did this is committed."""
        self._left += done.left
        if done.looked:
            lane, rows = self._left.popleft()
            if done.looked < rows.shape[1]:
                self._left.appendleft((lane, rows[:, done.looked :]))
        self._dead = self._dead if done.dead is None else done.dead

    def forget(self, transaction: lmdb.Transaction, versions: Collection[int]) -> Forgotten:
        """Forgets those of `versions` that are applied, with their dense weights."""
        records = self._records(transaction)
        gone = [one for one in records if one.version in versions]
        if not gone:
            return Forgotten()
        left: list[tuple[int, Changes]] = []
        lanes = {one.lane for one in gone}
        for lane in lanes:
            stay = {one.version: one.visible for one in records if one.lane == lane and one.version not in versions}
            mine = [one.version for one in gone if one.lane == lane]
            left += [(lane, rows) for rows in self._hand_on(transaction, mine, stay)] if stay else []
        for one in gone:
            for name in ("versions", "dense", "popular", "changes"):
                transaction.delete(u64(one.version), db=self._databases[name])
        empty = lanes - {one.lane for one in records if one.version not in versions}
        return Forgotten(len(gone), left, dead=True if empty else None)

    def retained(self, transaction: lmdb.Transaction) -> dict[int, list[Branch]]:
        """By lane the lines of descent that its versions are on; empty where nothing is left to look at."""
        lanes = dict[int, dict[int, Visible]]()
        for record in self._records(transaction) if self.left else ():
            lanes.setdefault(record.lane, {})[record.version] = record.visible
        return {lane: branches_of(versions) for lane, versions in lanes.items()}

    def tidy(
        self,
        transaction: lmdb.Transaction,
        retained: Mapping[int, Sequence[Branch]],
        floors: Mapping[str, int],
        at_most: int,
    ) -> Forgotten:
        """Deletes what nobody reads of the next `at_most` rows; once all were looked at, of lanes without versions."""
        raised = dict(floors)
        if not self._left:
            empty = delete_dead_lanes(transaction, self._databases["rows"], {*retained}, LANE_ROWS_AT_ONCE)
            raised = {lane: floor for lane, floor in raised.items() if int(lane) not in empty}
            return Forgotten(floors=raised, dead=len(empty) + len(retained) < LANES)
        lane, rows = self._left[0]
        tables, ids = rows[:, :at_most].tolist()
        for table, identity in zip(tables, ids, strict=True):
            floor = sweep_row(transaction, self._databases["rows"], stem(lane, table, identity), retained.get(lane, ()))
            raised[str(lane)] = max(raised.get(str(lane), 0), floor)
        return Forgotten(looked=len(ids), floors={lane: floor for lane, floor in raised.items() if floor})

    def _records(self, transaction: lmdb.Transaction) -> list[Served]:
        return [Served.parse(record) for _, record in transaction.cursor(self._databases["versions"])]

    def _hand_on(
        self, transaction: lmdb.Transaction, gone: Sequence[int], stay: Mapping[int, Visible]
    ) -> list[Changes]:
        """Adds what forgotten versions of a lane wrote to what the next ones wrote; returns the rows to look at."""
        changes, found = self._databases["changes"], list[Changes]()
        one_line = len(branches_of(stay)) == 1

        def wrote(version: int) -> Changes:
            return np.frombuffer(required(transaction, version, changes), np.uint64).reshape(2, -1)

        for heir, theirs in heirs_of(gone, sorted(stay)).items():
            # Of what the oldest version of a line reads, only what later ones wrote too is useless now.
            oldest = one_line and heir == min(stay)
            rows = rows_of([*map(wrote, theirs[1:] if oldest else theirs), *([] if heir is None else [wrote(heir)])])
            if heir is not None:
                transaction.put(u64(heir), rows.tobytes(), db=changes)
            if rows.shape[1]:
                found.append(rows)
        return found


def rows_of(parts: Sequence[Changes]) -> Changes:
    """Each row once, by table and id.

    >>> rows_of([np.array([[1, 1], [9, 7]], np.uint64), np.array([[1], [9]], np.uint64)]).tolist()
    [[1, 1], [7, 9]]
    """
    tables, ids = np.concatenate([np.empty((2, 0), np.uint64), *parts], axis=1)
    found = [np.empty((2, 0), np.uint64)]
    for table in np.unique(tables):
        own = np.unique(ids[tables == table])
        found.append(np.stack((np.full(len(own), table, np.uint64), own)))
    return np.concatenate(found, axis=1)


def heirs_of(gone: Sequence[int], stay: Sequence[int]) -> dict[int | None, list[int]]:
    """The forgotten versions by the next one that stays, None where there is none; both ascending.

    >>> heirs_of([1, 2, 4, 9], [3, 7])
    {3: [1, 2], 7: [4], None: [9]}
    """
    found: dict[int | None, list[int]] = {}
    for version in gone:
        place = bisect_left(stay, version)
        found.setdefault(stay[place] if place < len(stay) else None, []).append(version)
    return found
