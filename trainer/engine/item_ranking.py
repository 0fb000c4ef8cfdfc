"""Learns how `recommend` ranks items: lists of items with decayed counts, and the weights of the item score.

It processes the rows of accepted updates in order, record by record:

1. Some rows, chosen by a hash of user and time, train the weights before they are counted. Each is one step of softmax
   regression over the candidates that serving would have (`state/ranking/item_scores.py`). The step is a natural
   gradient with a Kronecker-factored curvature (Martens and Grosse 2015).
2. Each click is counted in several lists: of its category, of its context, of all clicks, of the user's previous item,
   and of the user.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from state.compiled import compiled, inlined, layout, mix, part_of_sums
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
    ALL,
    COLUMNS,
    FEATURES,
    INTERESTS_AT,
    KINDS,
    MOST,
    UNSEEN,
    WEIGHTS,
    Reads,
    Workspace,
    clear,
    gather,
    score,
)
from trainer.engine.compiled.rows import exponentials, highest_of
from trainer.engine.engine import Scores
from trainer.engine.online_regression import LEAST_ROWS, OnlineRegression
from trainer.tables.index import F32, I32, U64
from trainer.tables.lists import ItemListTable

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

ROWS_OF_A_LIST = {CLICKED: 32, FOLLOWED: 8, VISITED: 8}
"""`trainer.max_rows` allows one list for this many rows."""
CAPACITY = 1024
FIRST_EVERY, EVERY, HALVED_AFTER = 2, 256, 512
"""One in `FIRST_EVERY` rows trains the weights at first, half as many after each `HALVED_AFTER` of them, down to one in
`EVERY`."""
NEW_USERS = 4
"""How many times as many rows of users without clicks train the weights."""
KEPT = 1.0 - 1.0 / 20_000
"""The curvature of earlier rows is multiplied by this for each row that trains the weights."""
DAMPING, FIRST_ROWS = 30.0, 100.0
"""What is added to the diagonals of the curvature, and the number of rows that it stands for."""
_EXCLUDED = np.float32(-1e30)
"""The score of an item that has no share."""
AHEAD = 3
"""The lists of a row are prefetched this many rows before it is counted."""


@layout("f8[:, :, ::1], f8[:, :, ::1], f8[:, :, ::1], f8[::1]")
class Learned(NamedTuple):
    """The weights of the item score, of each kind, and their curvature.

    For the gradient d phi' of a row, the step is rows (features + DAMPING)^-1 d phi' (columns + DAMPING)^-1.

    Attributes:
        weights: `[KINDS, FEATURES, COLUMNS]` float64.
        features: `[KINDS, FEATURES, FEATURES]` float64, the lower triangles of the decayed sums of d d'.
        columns: `[KINDS, COLUMNS, COLUMNS]` float64, likewise of phi phi'.
        rows: `[KINDS]` float64, their decayed number.
    """

    weights: F64
    features: F64
    columns: F64
    rows: F64

    @classmethod
    def first(cls) -> Learned:
        """Before any row is learned."""
        curvature = np.zeros((KINDS, FEATURES, FEATURES)), np.zeros((KINDS, COLUMNS, COLUMNS))
        return cls(item_scores.first_weights(), *curvature, np.full(KINDS, FIRST_ROWS))


class _Seen(NamedTuple):
    """An accepted update that is not counted yet."""

    batch: MicroBatch
    scores: Scores
    successors: U64
    popular: U64

    def clicks(self) -> I64:
        """The rows that are clicks on an item; those of probe users have no weight."""
        batch = self.batch
        return np.flatnonzero((batch.item != 0) & (batch.weight > 0) & ~(batch.label < 0.5))

    def candidates(self, rows: I64) -> tuple[F32, U64]:
        """The logits and ids of the candidate categories of rows, the newest category first, `[m, c]` each."""
        scores = self.scores
        logits = [part[rows] for part in (scores.recent_logits, scores.popular_logits, scores.successor_logits)]
        ids = self.batch.recent_categories[rows], self.popular[None].repeat(rows.size, 0), self.successors[rows]
        return np.concatenate(logits, 1), np.concatenate(ids, 1)


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
        super().__init__(WEIGHTS, Learned.first()._asdict())

    @classmethod
    def of(cls, settings: Settings) -> ItemRanking | None:
        """Builds it from the settings; None with a privacy budget, or with `trainer.item_ranking = engagement`."""
        return cls(settings) if settings.trainer.item_ranking == "counts" and not settings.privacy.epsilon else None

    def clear(self) -> None:
        """See `OnlineRegression`; also forgets clicks that are not counted yet."""
        super().clear()
        self._seen = list[_Seen]()

    def served(self) -> dict[str, npt.NDArray[Any]]:
        """See `OnlineRegression`; until enough rows taught the weights for new items, those for all items take their place."""
        tensors = super().served()
        if tensors and self._values["rows"][UNSEEN] < FIRST_ROWS + LEAST_ROWS - 1:
            tensors[WEIGHTS][UNSEEN] = tensors[WEIGHTS][ALL]
        return tensors

    def see(self, batch: MicroBatch, scores: Scores, successors: U64, popular: U64) -> None:
        """Takes the rows of an accepted update; `count` learns from them and counts them.

        Args:
            batch: n rows.
            scores: Of the rows, before the update.
            successors: `[n, S]` uint64, the candidates of the row.
            popular: `[P]` uint64, likewise.
        """
        self._seen.append(_Seen(batch, scores, successors, popular))

    def count(self) -> None:
        """Learns from the rows seen since the last call, and counts them."""
        seen, self._seen = [(part, rows) for part in self._seen if (rows := part.clicks()).size], []
        if not seen:
            return
        user, item, at_ms, category = (
            np.concatenate([getattr(part.batch, name)[rows] for part, rows in seen])
            for name in ("user", "item", "at_ms", "category")
        )
        context = np.concatenate([part.batch.context[rows] for part, rows in seen])
        keys = np.concatenate([category[:, None], context], 1)
        clicked, followed, visited = (self.tables[name] for name in (CLICKED, FOLLOWED, VISITED))
        # 1. Lists are created, and evicted.
        own = visited.observe(user, at_ms)
        lists, at = visited.distinct(own)
        newest = np.zeros((2, len(own)), np.uint64)
        _newest(at, item, visited.held.ids[lists, :2], newest)
        every = np.uint64(min(FIRST_EVERY << min(self.learned // HALVED_AFTER, 8), EVERY))
        teaching = np.empty(len(own), np.bool_)
        scheduled = _draw(user, at_ms, newest[0], every, teaching)
        taught = np.flatnonzero(teaching)
        after = followed.observe(newest[0], at_ms)
        counted = np.concatenate([EVERYTHING, keys.reshape(-1)])
        times = np.concatenate([np.full(len(EVERYTHING), at_ms.max()), np.repeat(at_ms, keys.shape[1])])
        found = clicked.observe(counted, times)
        # 2. The positions of the lists.
        if sum(table.evict() for table in self.tables.values()):
            own, after, found = visited.find(user), followed.find(newest[0]), clicked.find(counted)
        everything = found[: len(EVERYTHING)].copy()
        candidates, first = [], 0
        for part, rows in seen:
            candidates.append(part.candidates(rows[teaching[first : first + rows.size]]))
            first += rows.size
        logits, ids = (np.concatenate(column) for column in zip(*candidates, strict=True))
        likely, shares = item_scores.likeliest(logits, ids)
        every_list = EVERYTHING[None].repeat(taught.size, 0)
        read_ids = np.concatenate([every_list, ids[:, :1], likely, context[taught]], 1)
        sources = item_scores.sources_of(context.shape[1])
        weights = np.ones((taught.size, len(sources)), np.float32)
        weights[:, sources == INTERESTS_AT] = shares
        # 3. Rows are learned and counted one after another.
        learned = _learn_and_count(
            item,
            at_ms // 1000,
            own,
            after,
            followed.find(newest[1, taught]),
            found[len(EVERYTHING) :].reshape(keys.shape),
            everything,
            taught,
            clicked.find(read_ids.reshape(-1)).reshape(read_ids.shape),
            sources,
            weights,
            clicked.held,
            followed.held,
            visited.held,
            Learned(**self._values),
            self._work,
        )
        # The additional rows of new users do not advance the schedule.
        self.learned += learned * scheduled // max(taught.size, 1)


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


@compiled("u8[::1], i8[::1], u8[::1], u8, bool[::1]")
def _draw(user: U64, at_ms: I64, newest: U64, every: np.uint64, teaching: Flags) -> int:
    """Flags the rows that train the weights: one in `every`, a power of two, and more of users without clicks.

    Returns how many would be flagged without those additional ones.
    """
    more = max(every // np.uint64(NEW_USERS), np.uint64(1))
    count = 0
    for i in range(user.shape[0]):
        drawn = mix(user[i] ^ mix(np.uint64(at_ms[i])))
        scheduled = drawn & (every - np.uint64(1)) == np.uint64(0)
        is_new = newest[i] == np.uint64(0)
        teaching[i] = scheduled or (is_new and drawn & (more - np.uint64(1)) == np.uint64(0))
        count += int(scheduled)
    return count


@inlined
def _lists(lists: ItemLists, row: int, item: np.uint64) -> bool:
    """Whether a list has an item; list 0 is empty."""
    found = False
    for k in range(lists.ids.shape[1]):
        found |= lists.ids[row, k] == item
    return found


@inlined
def _is_candidate(
    item: np.uint64, reads: Reads, after: I32, user: int, clicked: ItemLists, followed: ItemLists, visited: ItemLists
) -> bool:
    """Whether one of the lists that `gather` reads has an item."""
    if _lists(visited, user, item) or _lists(followed, after[0], item) or _lists(followed, after[1], item):
        return True
    # Only one of the lists of everything may have it.
    its = np.int64(mix(item) % np.uint64(LISTS_OF_EVERYTHING))
    for k in range(reads.rows.shape[0]):
        if (k == its or k >= LISTS_OF_EVERYTHING) and _lists(clicked, reads.rows[k], item):
            return True
    return False


@layout("f4[::1], i4[::1], f8[::1], f8[::1], f8[:, ::1]")
class Scratch(NamedTuple):
    """Memory of `_learn`, overwritten: two arrays of `[MOST]`, two vectors and a matrix."""

    shares: F32
    bits: I32
    gradient: F64
    columns: F64
    factor: F64


@part_of_sums
def _solve(matrix: F64, right: F64, factor: F64) -> None:
    """Solves (matrix + DAMPING I) x = right in place, by Cholesky decomposition.

    `matrix`: `[n, n]`, its lower triangle. `factor`: `[m, m]`, m >= n, overwritten.
    """
    # By columns, because the entries of a column do not wait for each other.
    for j in range(right.shape[0]):
        for i in range(j, right.shape[0]):
            total = matrix[i, j]
            for k in range(j):
                total -= factor[i, k] * factor[j, k]
            factor[i, j] = total / factor[j, j] if j < i else np.sqrt(total + DAMPING)
    for i in range(right.shape[0]):
        for k in range(i):
            right[i] -= factor[i, k] * right[k]
        right[i] /= factor[i, i]
    for i in range(right.shape[0] - 1, -1, -1):
        for k in range(i + 1, right.shape[0]):
            right[i] -= factor[k, i] * right[k]
        right[i] /= factor[i, i]


@part_of_sums
def _add_outer(matrix: F64, vector: F64) -> None:
    """Decays the lower triangle of a sum of outer products, and adds that of a vector."""
    for i in range(vector.shape[0]):
        for j in range(i + 1):
            matrix[i, j] = KEPT * matrix[i, j] + vector[i] * vector[j]


@part_of_sums
def _learn(
    kind: int, item: np.uint64, count: int, phi: F32, learned: Learned, work: Workspace, scratch: Scratch
) -> bool:
    """One step of softmax regression towards the clicked item; False if the item is not a candidate.

    For `UNSEEN`, the user's own items have a share of 0, and the clicked item must be none of them.
    """
    target = -1
    for i in range(count):
        if work.items[i] == item:
            target = i
    if target < 0:
        return False
    if kind == UNSEEN:
        for i in range(count):
            if work.own[i] != 0:
                work.scores[i] = _EXCLUDED
    scores, shares, bits = work.scores[:count], scratch.shares, scratch.bits
    scale = bits.view(np.float32)
    total = exponentials(scores, highest_of(scores), shares[:count], bits[:count], scale[:count])
    gradient, columns = scratch.gradient, scratch.columns
    for a in range(FEATURES):
        expected = np.float32(0.0)
        for i in range(count):
            expected += shares[i] * work.features[a, i]
        gradient[a] = work.features[a, target] - expected / total
    for c in range(COLUMNS):
        columns[c] = phi[c]
    _add_outer(learned.features[kind], gradient)
    _add_outer(learned.columns[kind], columns)
    learned.rows[kind] = KEPT * learned.rows[kind] + 1.0
    _solve(learned.features[kind], gradient, scratch.factor)
    _solve(learned.columns[kind], columns, scratch.factor)
    for a in range(FEATURES):
        for c in range(COLUMNS):
            learned.weights[kind, a, c] += learned.rows[kind] * gradient[a] * columns[c]
    return True


@compiled(
    "u8[::1], i8[::1], i4[::1], i4[::1], i4[::1], i4[:, ::1], i4[::1], i8[::1], i4[:, ::1], i4[::1], f4[:, ::1], "
    "ItemLists, ItemLists, ItemLists, Learned, Workspace"
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
    learned: Learned,
    work: Workspace,
) -> int:
    phi, after = np.zeros(COLUMNS, np.float32), np.zeros(2, np.int32)
    shares, bits = np.empty(MOST, np.float32), np.empty(MOST, np.int32)
    scratch = Scratch(shares, bits, np.empty(FEATURES), np.empty(COLUMNS), np.empty((FEATURES, FEATURES)))
    following, taught_rows = 0, 0
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
            following += 1
            if following < taught.shape[0]:
                for row in read_rows[following]:
                    prefetch_list(row, clicked)
            if _is_candidate(item[i], reads, after, own[i], clicked, followed, visited):
                count = gather(clicked, followed, visited, reads, after, own[i], at_s[i], phi, work)
                score(learned.weights[ALL], phi, count, work)
                is_taught = _learn(ALL, item[i], count, phi, learned, work, scratch)
                # Repeats teach nothing about new items.
                if is_taught and not _lists(visited, own[i], item[i]):
                    score(learned.weights[UNSEEN], phi, count, work)
                    _learn(UNSEEN, item[i], count, phi, learned, work, scratch)
                taught_rows += is_taught
                clear(count, work)
        count_click(everything[(mix(item[i]) % np.uint64(LISTS_OF_EVERYTHING))], item[i], at_s[i], clicked)
        for k in range(keys.shape[1]):
            if keys[i, k] != 0:
                count_click(keys[i, k], item[i], at_s[i], clicked)
        if own[i] != 0:
            if newest[i] != 0 and visited.ids[own[i], 0] != item[i]:
                count_click(newest[i], item[i], at_s[i], followed)
            count_visit(own[i], item[i], at_s[i], visited)
    return taught_rows
