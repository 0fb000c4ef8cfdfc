"""The compiled engine: the default ranker's step on a CPU, in compiled loops and matrix products.

1. Distinct rows of each table are found and gathered, and crosses are scored (`trainer/engine/crosses.py`).
2. The tower runs forward (`tower.py`).
3. The heads score candidates and pairs, and learn within the record (`heads.py`).
4. The tower runs backward; derivatives are gathered by distinct row.
5. `apply` moves the gathered rows by Adagrad and the dense weights by Adam.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from state.compiled import compiled_sums, read_only
from trainer.engine.adam import HostAdam
from trainer.engine.compiled.arrays import F32, FAST, FROM_HEADS, I32, Facts, FastWeights, Gradients, HeadInputs
from trainer.engine.compiled.heads import Heads
from trainer.engine.compiled.preparing import Prepare
from trainer.engine.compiled.threads import Threads
from trainer.engine.compiled.tower import Embedded, Passed, Tower, scatter_rows
from trainer.engine.crosses import CrossLearner
from trainer.engine.engine import CROSS, I64, Gradient, Measured
from trainer.engine.record import Record
from trainer.model.attributes import combine
from trainer.model.default_model import DefaultModel
from trainer.model.hyperparameters import HYPERPARAMETERS
from trainer.model.model import Targets
from trainer.tables.table import Table

EPSILON = np.float32(HYPERPARAMETERS.epsilon)

_USES = {
    "user": ("user",),
    "item": ("item", "negative_item"),
    "category": ("recent", "popular", "successor", "category", "negative_category", "other"),
    "context": ("context",),
}
"""The ids of each table. Their order decides in which order rows first occur, and with it the bits of the gradient's norm."""

_WINDOWS = ("category_windows", "recent_next", "popular_next", "successor_next")
"""The inputs that are integers."""


class CompiledEngine:
    """See `trainer/engine/engine.py`.

    Args:
        model: The default ranker, with a dense tower.
        optimizer: The optimizer of its dense weights.
        prepare: The preprocessing.
        tables: The tables of embedding rows, by name.
        crosses: Scores and learns crosses.
        attributes: A, the number of attributes of an item.
        threads: The threads that share its loops.
    """

    name = "compiled"

    def __init__(
        self,
        model: DefaultModel,
        optimizer: HostAdam,
        prepare: Prepare,
        tables: Mapping[str, Table],
        crosses: CrossLearner,
        attributes: int,
        threads: Threads,
    ) -> None:
        # Without this, BLAS would divide each product among its own threads.
        threadpool_limits(1, "blas")
        self._model, self._optimizer, self._prepare = model, optimizer, prepare
        self._tables, self._crosses, self._attributes = tables, crosses, attributes
        model.hold(optimizer.weights)
        self._tower = Tower(model, optimizer.weights, optimizer.gradients, threads)
        self._heads, self.threads = Heads(), threads
        self._weights = {name: optimizer.weights[weight] for weight, name in FROM_HEADS.items()}

    def measure(self, record: Record, move: bool = True, own: I64 | None = None) -> Measured:
        """See `Engine`."""
        crosses, crossed = self._crosses.measure(record)
        logits = crossed.logits
        if own is not None:
            record, logits = record.take(own), logits[own]
        rows, at = self._rows(record)
        distinct = {name: table.gather(rows[name]) for name, table in self._tables.items()}
        rows[CROSS] = crosses
        embedded = Embedded(
            user=distinct["user"],
            user_at=at["user"],
            category=distinct["category"],
            latest_at=np.ascontiguousarray(at["recent"][:, : HYPERPARAMETERS.latest]),
            popular_at=at["popular"],
            context=distinct["context"],
            context_at=at["context"].reshape(len(record), -1),
        )
        passed, forward = self._tower.forward(
            self._prepare(record.values["features"]), embedded, record.values["tower_kept"]
        )
        inputs = self._inputs(passed, distinct["category"], self._items(distinct, at), logits)
        slots = self._optimizer.fast if move else None
        facts = self._facts(record.values, record.targets, at)
        scores, gradients, fast, heads = self._heads.prepare(
            facts, inputs, slots, self._optimizer.fast_rate, self._model.drops
        )
        by_rows, by_popular_rows, by_layers, by_weights = self._tower.backward(
            passed, gradients.queries, gradients.popular_logits
        )

        def learn(thread: int) -> None:
            if thread == 0:
                heads(passed.progress, self._tower.block)

        self.threads.run((forward, learn, by_layers), (by_weights,), progress=passed.progress)
        sparse = self._sparse(distinct, at, gradients)
        into = sparse["user"], sparse["category"], sparse["context"]
        scatter_rows(embedded, by_rows, gradients.queries, by_popular_rows, *into)
        dense = {
            weight: getattr(gradients.fast if name in FAST else gradients, name) for weight, name in FROM_HEADS.items()
        }
        for weight, array in self._optimizer.gradients.items():
            if weight in dense:
                array[...] = dense[weight]
            dense[weight] = array
        squared = square(self._optimizer.gradient[None]) + square(gradients.fast.flat()[None])
        squared += sum(square(gradient[1:]) for gradient in sparse.values())
        return Measured(scores, squared, rows, crossed, Gradient(dense, sparse, fast))

    def apply(self, measured: Measured) -> None:
        """See `Engine`."""
        gradient: Gradient = measured.found
        for name, table in self._tables.items():
            at = measured.rows[name][1:]
            # The missing row is never trained.
            if at.size:
                adagrad(table.rows, table.accum, at, gradient.sparse[name][1:], self._model.settings.learning_rate)
        if measured.crossed is not None:
            self._crosses.apply(measured.rows[CROSS], measured.crossed)
        self._optimizer.apply(gradient.fast)

    def rows(self, record: Record) -> dict[str, I32]:
        """See `Engine`."""
        return self._rows(record)[0]

    def gradient(self, measured: Measured) -> Gradient:
        """See `Engine`."""
        gradient: Gradient = measured.found
        return gradient

    def with_gradient(self, measured: Measured, gradient: Gradient) -> Measured:
        """See `Engine`."""
        for name, array in self._optimizer.gradients.items():
            array[...] = gradient.dense[name]
        return replace(measured, found=gradient)

    def predict(self, inputs: Mapping[str, F32]) -> dict[str, F32]:
        """See `Engine`."""
        count, dim = len(inputs["features"]), self._model.settings.dim
        category, at = _category_rows(inputs)
        own, none = np.arange(1, count + 1, dtype=np.int32), np.zeros(count, np.int32)
        embedded = Embedded(
            user=_behind_missing(inputs["user_row"]),
            user_at=own,
            category=category,
            latest_at=np.ascontiguousarray(at["recent"][:, : HYPERPARAMETERS.latest]),
            popular_at=at["popular"],
            context=_behind_missing(inputs["context_row"]),
            context_at=own[:, None],
        )
        hidden = self._model.settings.hidden[0]
        prepared = self._prepare(inputs["features"].astype(np.uint16))
        passed, forward = self._tower.forward(prepared, embedded, np.ones((count, hidden), np.float32))
        zeros = np.zeros(count, np.float32)
        windows = {name: inputs[name].astype(np.uint16) for name in _WINDOWS}
        pairs = {"category": at["own"], "negative_category": none, "item": own, "negative_item": none}
        # No row has a target, nor a category besides its candidates.
        facts = self._facts(
            {**inputs, **windows, "other_mask": zeros},
            Targets(none - np.int32(1), *[zeros] * 6),
            {**at, **pairs, "other": none},
        )
        of_heads = self._inputs(passed, category, _behind_missing(inputs["item_row"]), inputs["cross"])
        scores, _, _, heads = self._heads.prepare(facts, of_heads, None, 0.0, False)

        def score(thread: int) -> None:
            if thread == 0:
                heads(passed.progress, self._tower.block)

        self.threads.run((forward, score), progress=passed.progress)
        return {
            "recent_logits": scores.recent_logits,
            "popular_logits": scores.popular_logits,
            "successor_logits": scores.successor_logits,
            "engagement_logit": scores.engagement[:count],
            "vector": passed.plain[-1].copy(),
            "item_query": passed.plain_queries[:, dim : 2 * dim] + self._weights["item_bias"],
        }

    def _rows(self, record: Record) -> tuple[dict[str, I32], dict[str, I32]]:
        """Returns the distinct rows of each table, and, by the name of the ids, the index of each id's row among them.

        With attributes the heads get one row for each combination of item and attributes.
        """
        uses = {table: {name: record.ids[name].reshape(-1) for name in names} for table, names in _USES.items()}
        combined = None
        if self._attributes:
            sides = ("item", "negative_item"), ("item_attributes", "negative_item_attributes")
            combined = combine(*(np.concatenate([record.ids[name] for name in names]) for names in sides))
            uses["item"] = {"combined_item": combined.item}
            uses["context"]["item_attributes"] = combined.attributes.reshape(-1)
        rows: dict[str, I32] = {}
        at: dict[str, I32] = {}
        for name, parts in uses.items():
            table = self._tables[name]
            rows[name], indices = table.distinct(table.find(np.concatenate(list(parts.values()))))
            end = 0
            for use, ids in parts.items():
                at[use], end = indices[end : end + ids.size], end + ids.size
        if combined is not None:
            at["item"], at["negative_item"] = np.split(combined.at, 2)
        shaped = ("recent", "successor")
        return rows, at | {name: at[name].reshape(record.ids[name].shape) for name in shaped}

    def _facts(self, values: Mapping[str, Any], targets: Targets, at: Mapping[str, I32]) -> Facts:
        scaling = self._model.window_scaling
        return Facts(
            windows=read_only(values["category_windows"]),
            recent_next=values["recent_next"],
            log_scale=scaling.log_scale,
            scale=scaling.scale,
            shift=scaling.shift,
            recent_mask=values["recent_mask"],
            popular_mask=values["popular_mask"],
            successor_mask=values["successor_mask"],
            other_mask=values["other_mask"],
            popular_next=values["popular_next"],
            successor_next=values["successor_next"],
            recent_at=at["recent"],
            successor_at=at["successor"],
            other_at=at["other"],
            pair_category_at=np.concatenate([at["category"], at["negative_category"]]),
            pair_item_at=np.concatenate([at["item"], at["negative_item"]]),
            target=targets.slot,
            weight=targets.weight,
            engaged=np.concatenate([targets.label, np.zeros_like(targets.label)]),
            engaged_shift=np.concatenate([targets.label_shift, targets.negative_shift]),
            engaged_weight=np.concatenate([targets.label_weight, targets.negative_weight]),
        )

    def _inputs(self, passed: Passed, category: F32, item: F32, crossed: F32) -> HeadInputs:
        weights = self._weights
        return HeadInputs(
            plain_queries=passed.plain_queries,
            queries=passed.queries,
            plain_popular=passed.plain_popular,
            popular_logits=passed.popular,
            user_features=passed.user_features,
            category=category,
            item=item,
            prior=weights["prior"],
            item_bias=weights["item_bias"][None],
            category_bias=weights["category_bias"][None],
            crossed=crossed,
            fast=FastWeights(*(weights[name] for name in FAST)),
        )

    def _items(self, distinct: Mapping[str, F32], at: Mapping[str, I32]) -> F32:
        """The rows of items that pairs name; with attributes the item's own plus the mean of theirs."""
        if not self._attributes:
            return distinct["item"]
        rows = distinct["context"][at["item_attributes"]].reshape(-1, self._attributes, self._model.settings.dim)
        items: F32 = distinct["item"][at["combined_item"]] + rows.mean(1)
        return items

    def _sparse(self, distinct: Mapping[str, F32], at: Mapping[str, I32], gradients: Gradients) -> dict[str, F32]:
        """The derivatives by the distinct rows of each embedding table that the heads found."""
        sparse = {"user": np.zeros_like(distinct["user"]), "item": gradients.item, "category": gradients.category}
        sparse["context"] = np.zeros_like(distinct["context"])
        if self._attributes:
            sparse["item"] = np.zeros_like(distinct["item"])
            gather(sparse["item"], at["combined_item"], gradients.item)
            shares = np.repeat(gradients.item / np.float32(self._attributes), self._attributes, 0)
            gather(sparse["context"], at["item_attributes"], shares)
        return sparse


def _behind_missing(rows: F32) -> F32:
    """`[n, dim]` behind the missing row, which is zero."""
    return np.concatenate([np.zeros_like(rows[:1]), rows])


def _category_rows(inputs: Mapping[str, F32]) -> tuple[F32, dict[str, I32]]:
    """The category rows of a ranker's inputs, the missing row first, and the index of each use: recent, successor, popular, own.

    The heads know a category by its index, so a row's own category has the index of the recent category with an equal row.
    """
    own, recent = inputs["category_row"], inputs["recent_rows"]
    parts = {"recent": recent, "successor": inputs["successor_rows"], "popular": inputs["popular_rows"], "own": own}
    rows = _behind_missing(np.concatenate([part.reshape(-1, own.shape[1]) for part in parts.values()]))
    ends = np.cumsum([1, *(part.size // own.shape[1] for part in parts.values())], dtype=np.int32)
    at = {
        name: np.arange(begin, end, dtype=np.int32).reshape(part.shape[:-1])
        for (name, part), (begin, end) in zip(parts.items(), itertools.pairwise(ends.tolist()), strict=True)
    }
    same = (recent == own[:, None]).all(2) & (inputs["recent_mask"] != 0.0)
    equal = np.take_along_axis(at["recent"], same.argmax(1)[:, None], 1)[:, 0]
    known = np.where(same.any(1), equal, at["own"])
    at["own"] = np.where(own.any(1), known, np.int32(0)).astype(np.int32)
    return rows, at


@compiled_sums("f4[:, ::1], f4[:, ::1], i4[::1], f4[:, ::1], f4, f4")
def _adagrad(rows: F32, accum: F32, at: I32, gradient: F32, learning_rate: np.float32, epsilon: np.float32) -> None:
    for i in range(at.shape[0]):
        row = at[i]
        for d in range(rows.shape[1]):
            accum[row, d] += gradient[i, d] * gradient[i, d]
            rows[row, d] -= learning_rate * gradient[i, d] / (np.sqrt(accum[row, d]) + epsilon)


def adagrad(rows: F32, accum: F32, at: I32, gradient: F32, learning_rate: float) -> None:
    """Adagrad (Duchi, Hazan and Singer 2011) on some rows of a table, in place.

    Args:
        rows: `[n, dim]` float32, the table.
        accum: `[n, dim]` float32, the sums of squared derivatives.
        at: `[u]` int32, indices of the rows; each at most once.
        gradient: `[u, dim]` float32, the derivatives by these rows.
        learning_rate: Step size.

    >>> rows, accum = np.zeros((2, 1), np.float32), np.zeros((2, 1), np.float32)
    >>> adagrad(rows, accum, np.array([1], np.int32), np.full((1, 1), -3.0, np.float32), 0.5)
    >>> rows.round(4).tolist(), accum.tolist()
    ([[0.0], [0.5]], [[0.0], [9.0]])
    """
    _adagrad(rows, accum, at, gradient, np.float32(learning_rate), EPSILON)


@compiled_sums("f4[:, ::1], i4[::1], f4[:, ::1]")
def _gather(sums: F32, at: I32, slopes: F32) -> None:
    for i in range(at.shape[0]):
        for d in range(slopes.shape[1]):
            sums[at[i], d] += slopes[i, d]


@compiled_sums("f4[:, ::1]")
def _square(slopes: F32) -> float:
    total = 0.0
    for i in range(slopes.shape[0]):
        row = np.float32(0.0)
        for d in range(slopes.shape[1]):
            row += slopes[i, d] * slopes[i, d]
        total += float(row)
    return total


def gather(sums: F32, at: I32, slopes: F32) -> None:
    """Adds each of `slopes` `[n, dim]` to the row of `sums` `[u, dim]` with the index in `at` `[n]`, in order."""
    _gather(sums, at, slopes)


def square(slopes: F32) -> float:
    """The sum of the squares of `[u, dim]`.

    >>> square(np.array([[3.0, 4.0]], np.float32))
    25.0
    """
    return float(_square(slopes))
