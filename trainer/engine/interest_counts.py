"""Learns to correct the model's interests by decayed counts of the categories clicked next.

Of the accepted updates of each record, in the order of their rows:

1. The logits of the row's candidates are corrected (`state/ranking/interest_scores.py`). The progressive measures score
   these (`trainer/measures/progressive.py`).
2. A row that is a click teaches the weights: one step of softmax regression over the row's candidates, with Adagrad.
3. Its category is counted: in a list over all clicks, and in those of its user's newest category and newest item.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from state.compiled import compiled, layout, mix, part_of_sums, read_only
from state.config.settings import Settings
from state.features.spec import FeatureSpec
from state.microbatch.batch import MicroBatch
from state.ranking import interest_scores
from state.ranking.interest_scores import (
    COLUMNS,
    FEATURES,
    FIRST_HIT,
    FIRST_OWN,
    LIVES_READ,
    READ,
    WEIGHTS,
    Columns,
    Workspace,
    correct,
    gather,
    gather_everything,
    key_of_item,
    place_popular,
    score,
    take_candidate,
    take_popular,
)
from state.ranking.item_lists import (
    EVERYTHING,
    LISTS_OF_EVERYTHING,
    NEXT_CATEGORY,
    ItemLists,
    count_click,
    prefetch_list,
)
from trainer.engine.compiled.rows import divide, exponentials, highest_of
from trainer.engine.engine import Scores
from trainer.engine.guard import Verdict
from trainer.engine.online_regression import LEAST_ROWS, OnlineRegression
from trainer.engine.record import Record
from trainer.engine.report import Update
from trainer.tables.index import F32, I32, U64
from trainer.tables.lists import ItemListTable

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

ROWS_OF_A_LIST = 8
"""`trainer.max_rows` allows one list for so many rows."""
CAPACITY = 1024
RATE = 0.03
ROWS_BETWEEN = 64
"""The features by all clicks are computed again after so many rows of an update."""
_AHEAD = 4
"""The lists of the row so many rows later are prefetched."""


class Keyed(NamedTuple):
    """What is counted of a record.

    Attributes:
        keys: `[B, READ]` uint64, the keys of the lists of each row.
        clicks: `[B]` bool, the rows of accepted updates that are clicks.
    """

    keys: U64
    clicks: Flags


class InterestCounts(OnlineRegression):
    """The lists of categories and the weights of the correction.

    Args:
        settings: All settings.
        spec: Names the features.

    Attributes:
        table: The lists.
    """

    def __init__(self, settings: Settings, spec: FeatureSpec) -> None:
        trainer = settings.trainer
        most = max(trainer.max_rows // ROWS_OF_A_LIST, CAPACITY)
        self.table = ItemListTable(NEXT_CATEGORY, CAPACITY, 1, most)
        self._columns = Columns(spec)
        self._work: Workspace | None = None
        first = interest_scores.first_weights()
        super().__init__(WEIGHTS, {"weights": first, "squares": np.zeros_like(first)})

    @classmethod
    def of(cls, settings: Settings, spec: FeatureSpec) -> InterestCounts | None:
        """What the settings want; None with a privacy budget, or with `trainer.interests = model`."""
        wanted = settings.trainer.interests == "counts" and not settings.privacy.epsilon
        return cls(settings, spec) if wanted else None

    def keyed(self, batch: MicroBatch, updates: Sequence[Update], visited: ItemListTable | None) -> Keyed:
        """The keys of the lists of each row, for `learn`.

        Args:
            batch: The rows of the record.
            updates: In the order of the rows.
            visited: The users' own items before the record; None for no items.
        """
        clicks = _clicks(batch, updates)
        return Keyed(self._keys(batch, clicks, visited), clicks)

    def learn(self, batch: MicroBatch, updates: Sequence[Update], keyed: Keyed) -> list[Update]:
        """Corrects the scores of accepted updates, learns from their rows, and counts them.

        Args:
            batch: The rows of the record.
            updates: In the order of the rows.
            keyed: Of the rows, see `keyed`.

        Returns:
            The updates with corrected logits. Their losses and ranks remain those of the model.
        """
        if not any(update.verdict is Verdict.ACCEPT for update in updates):
            return list(updates)
        keys, clicks = keyed.keys, keyed.clicks & (batch.category != 0)
        # 1. Lists are created, and evicted.
        rows = None
        if clicks.any():
            counted, times = (keys, batch.at_ms) if clicks.all() else (keys[clicks], batch.at_ms[clicks])
            at_ms = np.concatenate([np.full(LISTS_OF_EVERYTHING, times.max()), np.repeat(times, READ)])
            seen = self.table.observe(np.concatenate([EVERYTHING, counted.reshape(-1)]), at_ms)
            if not self.table.evict() and counted is keys:
                rows = seen
        everything, rows = self._rows(keys, rows)
        clicked = np.where(clicks, batch.category, np.uint64(0))
        at_s, phi = batch.at_ms // 1000, self._columns.phi(batch.features, batch.category_windows)
        # 2. One row after another is corrected, learned from and counted.
        found, first = [], 0
        for update in updates:
            length = len(update.record)
            if update.verdict is Verdict.ACCEPT:
                mine, ids = slice(first, first + length), update.record.ids
                logits = Logits(*(np.array(part) for part in _logits(update.scores)))
                self.learned += _learn_and_count(
                    self.table.held,
                    everything,
                    rows[mine],
                    at_s[mine],
                    read_only(ids["recent"]),
                    ids["popular"].reshape(-1),
                    ids["successor"],
                    logits,
                    clicked[mine],
                    update.record.targets.slot,
                    phi[mine],
                    self.learned,
                    self._values["weights"],
                    self._values["squares"],
                    self._workspace(*_logits(update.scores)),
                )
                update = update._replace(scores=_with_logits(update.scores, logits))
            found.append(update)
            first += length
        return found

    def corrected(self, batch: MicroBatch, record: Record, scores: Scores, visited: ItemListTable | None) -> Scores:
        """Corrects the logits of a batch of B rows; changes nothing else."""
        if self.learned < LEAST_ROWS:
            return scores
        parts, ids = _logits(scores), record.ids
        popular = np.broadcast_to(ids["popular"], parts[1].shape)
        slots, logits = np.concatenate([ids["recent"], popular, ids["successor"]], 1), np.concatenate(parts, 1)
        everything, rows = self._rows(self._keys(batch, np.zeros(len(batch), np.bool_), visited))
        at_s, phi = batch.at_ms // 1000, self._columns.phi(batch.features, batch.category_windows)
        correct(
            self.table.held,
            everything,
            rows,
            at_s,
            slots,
            logits,
            self._values["weights"],
            phi,
            self._workspace(*parts),
        )
        ends = np.cumsum([part.shape[1] for part in parts[:2]])
        return _with_logits(scores, Logits(*np.split(logits, ends, 1)))

    def _keys(self, batch: MicroBatch, clicks: Flags, visited: ItemListTable | None) -> U64:
        """The keys of the newest category and the newest item of each row's user before the row, `[B, READ]` uint64."""
        keys = np.zeros((len(batch), READ), np.uint64)
        keys[:, 0] = batch.recent_categories[:, 0]
        if visited is not None:
            before = visited.held.ids[visited.find(batch.user), 0]
            places = np.zeros(2 << len(batch).bit_length(), np.int32)
            items = np.where(clicks, batch.item, np.uint64(0))
            _keys_of_newest_items(read_only(batch.user), items, before, places, keys)
        return keys

    def _rows(self, keys: U64, found: I32 | None = None) -> tuple[I32, I32]:
        """The lists over all clicks, and those of `[B, READ]` keys, int32. `found`: both, if they are known."""
        if found is None:
            found = self.table.find(np.concatenate([EVERYTHING, keys.reshape(-1)]))
        return found[:LISTS_OF_EVERYTHING].copy(), found[LISTS_OF_EVERYTHING:].reshape(keys.shape).copy()

    def _workspace(self, recent: F32, popular: F32, successor: F32) -> Workspace:
        """That of a record with such logits."""
        own = recent.shape[1]
        candidates = own + popular.shape[1] + successor.shape[1]
        if self._work is None or self._work.scores.size != candidates:
            self._work = Workspace.empty(candidates, own)
        return self._work


def _clicks(batch: MicroBatch, updates: Sequence[Update]) -> Flags:
    """The rows of accepted updates that are clicks, `[B]` bool."""
    accepted = np.zeros(len(batch), np.bool_)
    first = 0
    for update in updates:
        first += len(update.record)
        accepted[first - len(update.record) : first] = update.verdict is Verdict.ACCEPT
    clicks: Flags = accepted & (batch.weight > 0) & ~(batch.label < 0.5)
    return clicks


@layout("f4[:, ::1], f4[:, ::1], f4[:, ::1]")
class Logits(NamedTuple):
    """The logits of a record: `[B, L]`, `[B, P]` and `[B, S]` float32."""

    recent: F32
    popular: F32
    successor: F32


def _logits(scores: Scores) -> tuple[F32, F32, F32]:
    return scores.recent_logits, scores.popular_logits, scores.successor_logits


def _with_logits(scores: Scores, logits: Logits) -> Scores:
    return scores._replace(
        recent_logits=logits.recent, popular_logits=logits.popular, successor_logits=logits.successor
    )


@compiled("const(u8[::1]), u8[::1], u8[::1], i4[::1], u8[:, ::1]")
def _keys_of_newest_items(users: U64, items: U64, before: U64, places: I32, keys: U64) -> None:
    """Writes the key of the newest item of each row's user before the row; an item is 0 in a row that is no click.

    `before`: those before the first row. `places`: zeros, an index of the latest clicks by user; their number is a power of two.
    """
    last = np.uint64(places.shape[0] - 1)
    for i in range(users.shape[0]):
        at = mix(users[i]) & last
        while places[at] != 0 and users[places[at] - 1] != users[i]:
            at = (at + np.uint64(1)) & last
        keys[i, 1] = key_of_item(items[places[at] - 1] if places[at] != 0 else before[i])
        if items[i] != np.uint64(0):
            places[at] = i + 1


@part_of_sums
def _teach(
    target: int,
    phi: F32,
    i: int,
    hits: tuple[int, int],
    shares: F32,
    bits: I32,
    learned: tuple[F64, F64],
    work: Workspace,
) -> None:
    """One step of softmax regression of row i towards the target, with Adagrad. shares, bits: `[M]`, overwritten."""
    features, differences = work.features, work.factors
    total = exponentials(work.scores, highest_of(work.scores), shares, bits, bits.view(np.float32))
    inverse = np.float32(1.0) / total
    for j in range(shares.shape[0]):
        shares[j] *= -inverse
    shares[target] += np.float32(1.0)
    model = short = long = own = rank = np.float32(0.0)
    for j in range(shares.shape[0]):
        model += shares[j] * features[0, j]
        short += shares[j] * features[1, j]
        long += shares[j] * features[2, j]
        own += shares[j] * features[3, j]
        rank += shares[j] * features[4, j]
    differences[0], differences[1], differences[2] = model, short, long
    for a in range(1 + LIVES_READ, FIRST_OWN):
        differences[a] = np.float32(0.0)
    for k in range(hits[1]):
        a = 1 + LIVES_READ if k < hits[0] else 1 + 2 * LIVES_READ
        for h in range(LIVES_READ):
            differences[a + h] += shares[work.hits[k]] * work.logs[h, FIRST_HIT + k]
    for j in range(2):
        differences[FIRST_OWN + j] = shares[j] * features[3, j]
    differences[FIRST_OWN + 2], differences[FIRST_OWN + 3] = own, rank
    weights, squares = learned
    for a in range(FEATURES):
        for p in range(COLUMNS):
            gradient = np.float64(differences[a] * phi[i, p])
            squares[a, p] += gradient * gradient
            weights[a, p] += RATE * gradient / np.sqrt(squares[a, p] + 1e-3)


@compiled(
    "ItemLists, i4[::1], i4[:, ::1], i8[::1], const(u8[:, ::1]), u8[::1], u8[:, ::1], Logits, u8[::1], "
    "i4[::1], f4[:, ::1], i8, f8[:, ::1], f8[:, ::1], Workspace",
)
def _learn_and_count(
    lists: ItemLists,
    everything: I32,
    rows: I32,
    at_s: I64,
    recent: U64,
    popular: U64,
    successor: U64,
    logits: Logits,
    category: U64,
    slot: I32,
    phi: F32,
    before: int,
    weights: F64,
    squares: F64,
    work: Workspace,
) -> int:
    """`category`: 0 in rows that are no clicks. `before`: rows learned before. Returns the rows that taught the weights."""
    own, ranks, candidates, learned = recent.shape[1], popular.shape[0], work.scores.shape[0], 0
    shares, bits = np.empty(candidates, np.float32), np.empty(candidates, np.int32)
    for i in range(recent.shape[0]):
        if i + _AHEAD < recent.shape[0]:
            for source in range(READ):
                prefetch_list(rows[i + _AHEAD, source], lists)
        if i % ROWS_BETWEEN == 0:
            gather_everything(lists, everything, at_s[i], work)
            place_popular(own, popular, work)
        take_popular(own, popular, logits.popular, i, work)
        for j in range(own):
            take_candidate(j, recent[i, j], logits.recent[i, j], work)
        for j in range(successor.shape[1]):
            take_candidate(own + ranks + j, successor[i, j], logits.successor[i, j], work)
        hits = gather(lists, rows, at_s[i], i, work)
        score(weights, phi, i, hits, work)
        if before + learned >= LEAST_ROWS:
            divide(work.scores, i, logits.recent, logits.popular, logits.successor)
        if category[i] != np.uint64(0):
            if 0 <= slot[i] < candidates:
                _teach(slot[i], phi, i, hits, shares, bits, (weights, squares), work)
                learned += 1
            row = everything[np.int64(mix(category[i]) % np.uint64(LISTS_OF_EVERYTHING))]
            for source in range(1 + READ):
                if row != 0:
                    count_click(row, category[i], at_s[i], lists)
                row = rows[i, source] if source < READ else 0
    return learned
