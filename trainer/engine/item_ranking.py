"""Learns how `recommend` ranks items: lists of items with decayed counts, and the weights of the item score.

It processes the rows of accepted updates in order, record by record:

1. Some rows, chosen by a hash of user and time, train the weights before they are counted. Each is one step of softmax
   regression over the candidates that serving would have (`state/ranking/item_scores.py`).
2. Each click is counted in several lists: of its category, of its context, of all clicks, of the user's previous item,
   and of the user.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from state.compiled import compiled
from state.compiled.mixing import mix, mixed
from state.config.settings import Settings
from state.microbatch.batch import MicroBatch
from state.ranking import item_scores
from state.ranking.item_lists import (
    CLICKED,
    EVERYTHING,
    FOLLOWED,
    LISTS_OF_EVERYTHING,
    VISITED,
    ItemLists,
    count_click,
    count_visit,
    prefetch_list,
)
from state.ranking.item_scores import (
    COLUMNS,
    INTERESTS_AT,
    WEIGHTS,
    Reads,
    Workspace,
    clear,
    gather,
    learn,
    score,
)
from trainer.engine.engine import Scores
from trainer.engine.online_regression import OnlineRegression
from trainer.tables.index import F32, I32, U64
from trainer.tables.item_lists import ItemListTable

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

ROWS_OF_A_LIST = {CLICKED: 32, FOLLOWED: 8, VISITED: 8}
"""`trainer.max_rows` allows one list for this many rows."""
CAPACITY = 1024
FIRST_ROWS, FIRST_EVERY, EVERY = 2048, 8, 256
"""One in `EVERY` rows trains the weights; for the first `FIRST_ROWS` training rows, one in `FIRST_EVERY`."""
RATE = 0.06
AHEAD = 3
"""The lists of a row are prefetched this many rows before it is counted."""


class _Seen(NamedTuple):
    """Clicks of updates that are not counted yet.

    Attributes:
        user: `[n]` uint64.
        item: `[n]` uint64.
        at_ms: `[n]` int64.
        keys: `[n, 1 + K]` uint64, the keys in `clicked` of each: category and context values.
        taught: `[n]` bool, the m rows that train the weights.
        candidates: `[m, c]` uint64, their candidate categories, the newest category first.
        logits: `[m, c]` float32, of these.
        context: `[m, K]` uint64, their context values.
    """

    user: U64
    item: U64
    at_ms: I64
    keys: U64
    taught: Flags
    candidates: U64
    logits: F32
    context: U64


class ItemRanking(OnlineRegression):
    """The lists of items and the weights of the item score.

    Args:
        settings: All settings.

    Attributes:
        tables: The tables of lists, by name.
    """

    def __init__(self, settings: Settings) -> None:
        trainer = settings.trainer
        self.tables = {
            name: ItemListTable(
                name,
                CAPACITY,
                trainer.admit_after if name == FOLLOWED else 1,
                max(trainer.max_rows // rows, CAPACITY),
            )
            for name, rows in ROWS_OF_A_LIST.items()
        }
        self._work = Workspace.empty()
        super().__init__(WEIGHTS, item_scores.first_weights())

    @classmethod
    def of(cls, settings: Settings) -> ItemRanking | None:
        """Builds it from the settings; None with a privacy budget, or with `trainer.item_ranking = engagement`."""
        return cls(settings) if settings.trainer.item_ranking == "counts" and not settings.privacy.epsilon else None

    def clear(self) -> None:
        """See `OnlineRegression`; also forgets clicks that are not counted yet."""
        super().clear()
        self._seen = list[_Seen]()

    def see(self, batch: MicroBatch, scores: Scores, successors: U64, popular: U64) -> None:
        """Takes the rows of an accepted update; `count` learns from them and counts them.

        Args:
            batch: n rows.
            scores: Of the rows, before the update.
            successors: `[n, S]` uint64, the candidates of the row.
            popular: `[P]` uint64, likewise.
        """
        # Clicks of probe users have no weight.
        rows = np.flatnonzero((batch.item != 0) & (batch.weight > 0) & ~(batch.label < 0.5))
        if not rows.size:
            return
        user, at_ms = batch.user[rows], batch.at_ms[rows]
        keys = np.concatenate([batch.category[:, None], batch.context], 1)[rows]
        every = np.uint64(FIRST_EVERY if self.learned < FIRST_ROWS else EVERY)
        taught = mixed(user ^ mixed(at_ms.astype(np.uint64))) % every == 0
        at = rows[taught]
        parts = [part[at] for part in (scores.recent_logits, scores.popular_logits, scores.successor_logits)]
        recent = batch.recent_categories[at]
        ids = np.concatenate([recent, popular[None].repeat(at.size, 0), successors[at]], 1)
        self._seen.append(
            _Seen(user, batch.item[rows], at_ms, keys, taught, ids, np.concatenate(parts, 1), batch.context[at])
        )

    def count(self) -> None:
        """Learns from the rows seen since the last call, and counts them."""
        if not self._seen:
            return
        seen = _Seen(*(np.concatenate(column) for column in zip(*self._seen, strict=True)))
        self._seen = []
        clicked, followed, visited = (self.tables[name] for name in (CLICKED, FOLLOWED, VISITED))
        # 1. Lists are created, and evicted.
        own = visited.observe(seen.user, seen.at_ms)
        lists, at = visited.distinct(own)
        newest = np.zeros((2, len(own)), np.uint64)
        _newest(at, seen.item, visited.held.ids[lists, :2], newest)
        after = followed.observe(newest[0], seen.at_ms)
        keys = np.concatenate([EVERYTHING, seen.keys.reshape(-1)])
        times = np.repeat(seen.at_ms, seen.keys.shape[1])
        found = clicked.observe(keys, np.concatenate([np.full(len(EVERYTHING), seen.at_ms.max()), times]))
        # 2. The positions of the lists.
        if sum(table.evict() for table in self.tables.values()):
            own, after, found = visited.find(seen.user), followed.find(newest[0]), clicked.find(keys)
        taught = np.flatnonzero(seen.taught)
        everything = found[: len(EVERYTHING)].copy()
        likely, shares = item_scores.likeliest(seen.logits, seen.candidates)
        every = EVERYTHING[None].repeat(taught.size, 0)
        read_ids = np.concatenate([every, seen.candidates[:, :1], likely, seen.context], 1)
        sources = item_scores.sources_of(seen.keys.shape[1] - 1)
        weights = np.ones((taught.size, len(sources)), np.float32)
        weights[:, sources == INTERESTS_AT] = shares
        # 3. Rows are learned and counted one after another.
        self.learned += _learn_and_count(
            seen.item,
            seen.at_ms // 1000,
            own,
            after,
            followed.find(newest[1, taught]),
            found[len(EVERYTHING) :].reshape(seen.keys.shape),
            everything,
            taught,
            clicked.find(read_ids.reshape(-1)).reshape(read_ids.shape),
            sources,
            weights,
            clicked.held,
            followed.held,
            visited.held,
            self._weights,
            self._squares,
            self._work,
        )


@compiled("i4[::1], u8[::1], u8[:, ::1], u8[:, ::1]")
def _newest(own: I32, item: U64, latest: U64, newest: U64) -> None:
    """Writes to `newest` the newest item of each row's user before the row, and the one before that.

    latest: `[u, 2]`, the same of the distinct users before the first row; updated. `own`: each row's index in it.
    """
    for i in range(own.shape[0]):
        user = own[i]
        if user != 0:
            newest[0, i], newest[1, i] = latest[user, 0], latest[user, 1]
            if latest[user, 0] != item[i]:
                latest[user, 0], latest[user, 1] = item[i], latest[user, 0]


@compiled(
    "u8[::1], i8[::1], i4[::1], i4[::1], i4[::1], i4[:, ::1], i4[::1], i8[::1], i4[:, ::1], i4[::1], f4[:, ::1], "
    "ItemLists, ItemLists, ItemLists, f8[:, ::1], f8[:, ::1], Workspace"
)
def _learn_and_count(
    item: U64,
    at_s: I64,
    own: I32,
    newest: I32,
    second: I32,
    keys: I32,
    everything: I32,
    taught: I64,
    read_rows: I32,
    read_sources: I32,
    read_weights: F32,
    clicked: ItemLists,
    followed: ItemLists,
    visited: ItemLists,
    weights: F64,
    squares: F64,
    work: Workspace,
) -> int:
    phi = np.zeros(COLUMNS, np.float32)
    after = np.zeros(2, np.int32)
    following, learned = 0, 0
    for i in range(item.shape[0]):
        later = i + AHEAD
        if later < item.shape[0]:
            prefetch_list(own[later], visited)
            prefetch_list(newest[later], followed)
            for k in range(keys.shape[1]):
                prefetch_list(keys[later, k], clicked)
        if following < taught.shape[0] and taught[following] == i:
            reads = Reads(read_rows[following], read_sources, read_weights[following])
            after[0], after[1] = newest[i], second[following]
            count = gather(clicked, followed, visited, reads, after, own[i], at_s[i], phi, work)
            score(weights, phi, count, work)
            learned += learn(item[i], count, phi, RATE, weights, squares, work)
            clear(count, work)
            following += 1
        count_click(everything[(mix(item[i]) % np.uint64(LISTS_OF_EVERYTHING))], item[i], at_s[i], clicked)
        for k in range(keys.shape[1]):
            if keys[i, k] != 0:
                count_click(keys[i, k], item[i], at_s[i], clicked)
        if own[i] != 0:
            if newest[i] != 0 and visited.ids[own[i], 0] != item[i]:
                count_click(newest[i], item[i], at_s[i], followed)
            count_visit(own[i], item[i], at_s[i], visited)
    return learned
