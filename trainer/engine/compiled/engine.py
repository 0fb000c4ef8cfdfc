"""The compiled engine: the default ranker's step out of ids, arrays for the heads, and two graphs around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from trainer.engine.compiled.arrays import F32, I32, Facts, Gradients, Learned
from trainer.engine.compiled.graph import Graph, GraphFound
from trainer.engine.engine import CROSS, Measured
from trainer.engine.optimizers.adam import Adam
from trainer.engine.record import Record
from trainer.engine.sums import gather, square
from trainer.model.attributes import combine
from trainer.model.default_ranker import DefaultRanker
from trainer.model.hyperparameters import HYPERPARAMETERS
from trainer.tables.table import Table

_USES = {
    "user": ("user",),
    "item": ("item", "negative_item"),
    "category": ("recent", "popular", "successor", "category", "negative_category", "other"),
    "context": ("context",),
    CROSS: ("cross", "cross_share"),
}
"""The ids of each table. Their order decides in which order rows first occur, and with it the bits of the gradient's norm."""


class _Found(NamedTuple):
    """What `apply` needs."""

    graph: GraphFound
    sparse: Mapping[str, F32]
    learned: Learned


class CompiledEngine:
    """See `trainer/engine/engine.py`.

    Args:
        ranker: The default one.
        optimizer: Of its dense weights.
        tables: Of embedding rows and of crosses, by name.
        cross_precision: `[C]` float32, the precision of each cross's weight before anything was learned.
        fields: K, context fields of a row.
        attributes: A, of an item.
        device: Of the variables.
    """

    name = "compiled"

    def __init__(
        self,
        ranker: DefaultRanker,
        optimizer: Adam,
        tables: Mapping[str, Table],
        cross_precision: F32,
        fields: int,
        attributes: int,
        device: str,
    ) -> None:
        self._ranker, self._tables, self._cross_precision = ranker, tables, cross_precision
        self._attributes, self._device = attributes, device
        with tf.device(device):
            self._graph = Graph(ranker, optimizer, tables, fields, attributes)

    def measure(self, record: Record, move: bool = True) -> Measured:
        """See `Engine`."""
        rows, at = self._rows(record)
        facts = self._facts(record, at)
        inputs: dict[str, Any] = {f"{name}_rows": found for name, found in rows.items()}
        inputs |= {"features": record.values["features"], "kept": record.values["tower_kept"]}
        inputs["seed"] = np.array(record.seed, np.int32)
        inputs |= {f"{name}_at": at[name].reshape(-1) for name in ("user", "popular", "context")}
        inputs["latest_at"] = np.ascontiguousarray(at["recent"][:, : HYPERPARAMETERS.latest]).reshape(-1)
        if self._attributes:
            inputs |= {"item_at": at["combined_item"], "item_attributes_at": at["item_attributes"]}
        with tf.device(self._device):
            found, scores, gradients, learned = self._graph.measure(facts, inputs, move)
        sparse = self._sparse(rows, inputs, found, gradients)
        squared = float(found.norm.numpy()) + sum(square(gradient[1:]) for gradient in sparse.values())
        return Measured(scores, squared, rows, _Found(found, sparse, learned))

    def apply(self, measured: Measured) -> None:
        """See `Engine`."""
        found: _Found = measured.found
        with tf.device(self._device):
            self._graph.apply(measured.rows, found.sparse, found.graph, found.learned)

    def _rows(self, record: Record) -> tuple[dict[str, I32], dict[str, I32]]:
        """Distinct rows of each table, and where in them each use of an id is, by the name of the ids.

        With attributes what an item is depends on the row: the heads are given one
        row for each combination of item and attributes.
        """
        uses = {table: {name: record.ids[name].reshape(-1) for name in names} for table, names in _USES.items()}
        combined = combine(record.ids["item"], record.ids["item_attributes"]) if self._attributes else None
        if combined is not None:
            uses["item"] = {"combined_item": combined.item}
            uses["context"]["item_attributes"] = combined.attributes.reshape(-1)
        rows: dict[str, I32] = {}
        at: dict[str, I32] = {}
        for name, parts in uses.items():
            table = self._tables[name]
            rows[name], places = table.distinct(table.find(np.concatenate(list(parts.values()))))
            ends = np.cumsum([part.size for part in parts.values()])
            at |= dict(zip(parts, np.split(places, ends[:-1]), strict=True))
        if combined is not None:
            at |= {"item": combined.at, "negative_item": combined.at[record.partner]}
        return rows, at | {name: at[name].reshape(record.ids[name].shape) for name in ("recent", "successor", "cross")}

    def _facts(self, record: Record, at: Mapping[str, I32]) -> Facts:
        values, targets, scaling = record.values, record.targets, self._ranker.window_scaling
        return Facts(
            windows=np.concatenate([values["category_windows"], values["recent_next"]], 2),
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
            engaged=np.concatenate([targets.label, np.zeros(len(record), np.float32)]),
            engaged_shift=np.concatenate([targets.label_shift, targets.negative_shift]),
            engaged_weight=np.concatenate([targets.label_weight, targets.negative_weight]),
            cross_at=at["cross"],
            share_at=at["cross_share"],
            cross_prior=self._cross_precision,
        )

    def _sparse(
        self, rows: Mapping[str, I32], inputs: Mapping[str, Any], found: GraphFound, gradients: Gradients
    ) -> dict[str, F32]:
        """The derivatives by the distinct rows of each table; the first of them is the missing row."""
        dim = self._ranker.settings.dim
        sparse = {"user": np.zeros((rows["user"].size, dim), np.float32), "item": gradients.item}
        sparse |= {"category": gradients.category, "context": np.zeros((rows["context"].size, dim), np.float32)}
        if self._attributes:
            sparse["item"] = np.zeros((rows["item"].size, dim), np.float32)
            gather(sparse["item"], inputs["item_at"], gradients.item)
            shares = np.repeat(gradients.item / np.float32(self._attributes), self._attributes, 0)
            gather(sparse["context"], inputs["item_attributes_at"], shares)
        for name, at, of in (
            ("user", "user_at", found.user),
            ("category", "latest_at", found.latest),
            ("category", "popular_at", found.popular),
            ("context", "context_at", found.context),
        ):
            gather(sparse[name], inputs[at], of.numpy())
        return sparse
