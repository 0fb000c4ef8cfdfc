"""Learns to correct the model's interests by decayed counts of the categories clicked next.

Of the accepted updates of each record, in the order of their rows:

1. The logits of the row's candidates are corrected (`state/ranking/interest_scores.py`). The progressive measures score
   these (`trainer/measures/progressive.py`).
2. A row that is a click teaches the weights: one step of softmax regression over the row's candidates, with Adagrad.
3. Its category is counted: in a list over all clicks, and in those of its user's newest category and newest item.

All of it is a function of the log. Rows with a label below 0.5 are not clicks. With a privacy budget nothing is learned.
The guard has judged the updates by the model's own losses, and the model learns from these alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from state.compiled import compiled, part_of_sums
from state.compiled.mixing import mix
from state.config.settings import Settings
from state.features.spec import FeatureSpec
from state.microbatch.batch import MicroBatch
from state.ranking import interest_scores
from state.ranking.interest_scores import (
    COLUMNS,
    FEATURES,
    READ,
    WEIGHTS,
    Columns,
    Workspace,
    correct,
    gather,
    keys_of_items,
    score,
)
from state.ranking.item_lists import EVERYTHING, LISTS_OF_EVERYTHING, NEXT_CATEGORY, ItemLists, count_click
from trainer.engine.compiled.rows import exponentials, highest_of
from trainer.engine.engine import Scores
from trainer.engine.guard import Verdict
from trainer.engine.record import Record
from trainer.engine.report import Update
from trainer.tables.index import F32, I32, U64
from trainer.tables.item_lists import ItemListTable

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

ROWS_OF_A_LIST = 8
"""`trainer.max_rows` allows one list for so many rows."""
CAPACITY = 1024
LEAST_ROWS = 64
"""So many rows must have taught the weights before a version has them, and before they correct anything."""
RATE = 0.05


class InterestCounts:
    """The lists of categories and the weights of the correction.

    Args:
        settings: All settings.
        spec: Names the features.

    Attributes:
        table: The lists.
        learned: Rows that taught the weights.
    """

    def __init__(self, settings: Settings, spec: FeatureSpec) -> None:
        trainer = settings.trainer
        most = max(trainer.max_rows // ROWS_OF_A_LIST, CAPACITY)
        self.table = ItemListTable(NEXT_CATEGORY, CAPACITY, 1, most)
        self._columns = Columns(spec)
        self.clear()

    @classmethod
    def of(cls, settings: Settings, spec: FeatureSpec) -> InterestCounts | None:
        """What the settings want; None with a privacy budget, or with `trainer.interests = model`."""
        wanted = settings.trainer.interests == "counts" and not settings.privacy.epsilon
        return cls(settings, spec) if wanted else None

    def clear(self) -> None:
        """Forgets the weights. The trainer clears the table."""
        self.learned = 0
        self._weights = interest_scores.first_weights()
        self._squares = np.zeros_like(self._weights)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The weights, their sums of squared gradients, and how many rows taught them; empty if none did."""
        if not self.learned:
            return {}
        return {"weights": self._weights.copy(), "squares": self._squares.copy(), "learned": np.array(self.learned)}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Sets what `state` returned; a release without it, or with other features, starts from scratch."""
        self.clear()
        if "weights" in state and state["weights"].shape == self._weights.shape:
            self._weights = np.array(state["weights"], np.float64)
            self._squares = np.array(state["squares"], np.float64)
            self.learned = int(state["learned"])

    def served(self) -> dict[str, npt.NDArray[Any]]:
        """The tensors that serving reads; none before enough rows taught the weights."""
        return {WEIGHTS: self._weights.copy()} if self.learned >= LEAST_ROWS else {}

    def learn(self, batch: MicroBatch, updates: Sequence[Update], visited: ItemListTable | None) -> list[Update]:
        """Corrects the scores of accepted updates, learns from their rows, and counts them.

        Args:
            batch: The rows of the record.
            updates: In the order of the rows.
            visited: The users' own items before the record; None for no items.

        Returns:
            The updates with corrected logits. Their losses and ranks remain those of the model.
        """
        ends = np.cumsum([len(update.record) for update in updates])
        accepted = np.repeat([update.verdict is Verdict.ACCEPT for update in updates], np.diff(ends, prepend=0))
        rows = np.flatnonzero(accepted)
        if not rows.size:
            return list(updates)
        judged = [update for update in updates if update.verdict is Verdict.ACCEPT]
        ids, logits = (np.concatenate(parts) for parts in zip(*map(_slots_of, judged), strict=True))
        slot = np.concatenate([update.record.targets.slot for update in judged])
        category, at_ms = batch.category[rows], batch.at_ms[rows]
        clicks = (batch.weight[rows] > 0) & ~(batch.label[rows] < 0.5)
        # 1. Lists are created, and evicted.
        keys = np.stack(self._keys(batch, rows, clicks, visited), 1)
        counted = clicks & (category != 0)
        if counted.any():
            times = np.repeat(at_ms[counted], keys.shape[1])
            every = np.full(LISTS_OF_EVERYTHING, at_ms.max())
            self.table.observe(np.concatenate([EVERYTHING, keys[counted].reshape(-1)]), np.concatenate([every, times]))
            self.table.evict()
        # 2. One row after another is corrected, learned from and counted.
        self.learned += _learn_and_count(
            self.table.held,
            self._read(keys),
            at_ms // 1000,
            ids,
            logits,
            batch.recent_categories.shape[1],
            np.where(counted, category, np.uint64(0)),
            slot,
            self._columns.phi(batch.features[rows], batch.category_windows[rows]),
            self.learned,
            self._weights,
            self._squares,
            Workspace.empty(ids.shape[1]),
        )
        found, first = [], 0
        for update in updates:
            if update.verdict is Verdict.ACCEPT:
                mine = slice(first, first + len(update.record))
                update = update._replace(scores=_with_logits(update.scores, logits[mine]))
                first = mine.stop
            found.append(update)
        return found

    def corrected(self, batch: MicroBatch, record: Record, scores: Scores, visited: ItemListTable | None) -> Scores:
        """Corrects the logits of a batch of B rows; changes nothing else."""
        if self.learned < LEAST_ROWS:
            return scores
        rows = np.arange(len(batch))
        ids, logits = _slots(record, scores)
        keys = np.stack(self._keys(batch, rows, np.zeros(rows.size, np.bool_), visited), 1)
        correct(
            self.table.held,
            self._read(keys),
            batch.at_ms // 1000,
            ids,
            logits,
            batch.recent_categories.shape[1],
            self._weights,
            self._columns.phi(batch.features, batch.category_windows),
            Workspace.empty(ids.shape[1]),
        )
        return _with_logits(scores, logits)

    def _keys(self, batch: MicroBatch, rows: I64, clicks: Flags, visited: ItemListTable | None) -> tuple[U64, U64]:
        """The keys of the newest category and the newest item of each row's user before the row, `[n]` uint64."""
        newest = np.zeros(rows.size, np.uint64)
        if visited is not None:
            users, owner = np.unique(batch.user[rows], return_inverse=True)
            within = visited.held.ids[visited.find(users), 0]
            _newest_items(owner, np.where(clicks, batch.item[rows], np.uint64(0)), within, newest)
        return batch.recent_categories[rows, 0], keys_of_items(newest)

    def _read(self, keys: U64) -> I32:
        """The lists to read for each row, `[n, READ]` int32."""
        read = np.empty((len(keys), READ), np.int32)
        read[:, : len(EVERYTHING)] = self.table.find(EVERYTHING)
        read[:, len(EVERYTHING) :] = self.table.find(np.ascontiguousarray(keys.reshape(-1))).reshape(keys.shape)
        return read


def _slots_of(update: Update) -> tuple[U64, F32]:
    return _slots(update.record, update.scores)


def _slots(record: Record, scores: Scores) -> tuple[U64, F32]:
    """The candidates of the rows and their logits, `[B, M]` each."""
    recent, successor = record.ids["recent"], record.ids["successor"]
    popular = np.broadcast_to(record.ids["popular"], (len(record), record.ids["popular"].size))
    logits = np.concatenate([scores.recent_logits, scores.popular_logits, scores.successor_logits], 1)
    return np.concatenate([recent, popular, successor], 1), logits


def _with_logits(scores: Scores, logits: F32) -> Scores:
    """`logits`: `[B, M]` float32."""
    own, ranks = scores.recent_logits.shape[1], scores.popular_logits.shape[1]
    return scores._replace(
        recent_logits=logits[:, :own],
        popular_logits=logits[:, own : own + ranks],
        successor_logits=logits[:, own + ranks :],
    )


@compiled("i8[::1], u8[::1], u8[::1], u8[::1]")
def _newest_items(owner: I64, item: U64, within: U64, newest: U64) -> None:
    """The newest item of each row's user before the row; `within`: `[u]`, those before the first row, changed."""
    for i in range(owner.shape[0]):
        newest[i] = within[owner[i]]
        if item[i] != np.uint64(0):
            within[owner[i]] = item[i]


@part_of_sums
def _teach(target: int, phi: F32, shares: F32, bits: I32, weights: F64, squares: F64, work: Workspace) -> None:
    """One step of softmax regression towards the target, with Adagrad. shares, bits: `[M]`, overwritten."""
    total = exponentials(work.scores, highest_of(work.scores), shares, bits, bits.view(np.float32))
    for a in range(FEATURES):
        expected = np.float32(0.0)
        for j in range(shares.shape[0]):
            expected += shares[j] * work.features[a, j]
        difference = work.features[a, target] - expected / total
        for p in range(COLUMNS):
            gradient = np.float64(difference) * phi[p]
            squares[a, p] += gradient * gradient
            weights[a, p] += RATE * gradient / np.sqrt(squares[a, p] + 1e-3)


@compiled(
    "ItemLists, i4[:, ::1], i8[::1], u8[:, ::1], f4[:, ::1], i8, u8[::1], i4[::1], f4[:, ::1], i8, "
    "f8[:, ::1], f8[:, ::1], Workspace"
)
def _learn_and_count(
    lists: ItemLists,
    read: I32,
    at_s: I64,
    ids: U64,
    logits: F32,
    own: int,
    category: U64,
    slot: I32,
    phi: F32,
    before: int,
    weights: F64,
    squares: F64,
    work: Workspace,
) -> int:
    """`category`: 0 in rows that are no clicks. `before`: rows learned before. Returns the rows that taught the weights."""
    candidates, learned = ids.shape[1], 0
    shares, bits = np.empty(candidates, np.float32), np.empty(candidates, np.int32)
    for i in range(ids.shape[0]):
        gather(lists, read[i], at_s[i], ids[i], logits[i], own, work)
        score(weights, phi[i], logits[i], work)
        if before + learned >= LEAST_ROWS:
            logits[i] = work.scores
        if category[i] != np.uint64(0) and 0 <= slot[i] < candidates:
            _teach(slot[i], phi[i], shares, bits, weights, squares, work)
            learned += 1
        if category[i] != np.uint64(0):
            of_it = np.int64(mix(category[i]) % np.uint64(LISTS_OF_EVERYTHING))
            for k in (of_it, READ - 2, READ - 1):
                if read[i, k] != 0:
                    count_click(read[i, k], category[i], at_s[i], lists)
    return learned
