"""Builds the tables and the optimizer of a trainer, for every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from state.config.settings import Settings
from state.microbatch.batch import MicroBatch
from state.ranking.crosses import WIDTH
from trainer.engine.engine import CROSS
from trainer.model.hyperparameters import HYPERPARAMETERS
from trainer.model.model import Model
from trainer.tables.index import U64
from trainer.tables.lists import CountTable
from trainer.tables.table import INITIAL_ACCUMULATOR, Table

Kind = TypeVar("Kind")

TRANSITION = "transition"
"""The table of what came next after a category, which is counted and not learned."""

TRANSITION_CAPACITY = 1024
"""Initial lists: as many as there are categories, 800 bytes each."""

CAPACITY = 65_536
"""Initial rows of a table, which grows as needed."""

CROSSES_OF_A_ROW = 4
"""`trainer.max_rows` allows this many crosses for each row."""

PRIVATE_LEARNING_RATE = 20.0
"""With a privacy budget, the learning rate of the dense weights in multiples of `model.dense_learning_rate`."""

ROWS_OF_A_LIST = 8
"""`trainer.max_rows` allows one list for this many rows, because a list takes more memory."""


def labelled(settings: Settings) -> bool:
    """Whether rows of the log have labels, so that no negatives are drawn."""
    return bool(settings.events.label or settings.labels.impressions)


def optimizer_of(kind: Callable[..., Kind], weights: Mapping[str, Any], model: Model, settings: Settings) -> Kind:
    """The optimizer of the dense weights. With differential privacy all weights share one rate: noise is set per update."""
    private = settings.privacy.epsilon > 0
    return kind(
        weights,
        settings.model.dense_learning_rate * (PRIVATE_LEARNING_RATE if private else 1.0),
        {} if private else model.learning_rates,
        model.fast_weights,
        1.0 if private else HYPERPARAMETERS.fast_learning_rate,
    )


def table_of(device: str | None, *arguments: Any) -> Table:
    """A `Table` made of `arguments`, with its rows on a TensorFlow device, or in host arrays if `device` is None."""
    if device is None:
        return Table(*arguments)
    from trainer.tables.device_table import DeviceTable

    return DeviceTable(device, *arguments)


def tables_of(model: Model, settings: Settings, device: str | None) -> dict[str, Table]:
    """Embedding rows, crosses, and the ranker's own tables, by name. Without a `device` rows are kept in host arrays."""
    dim, trainer = settings.model.dim, settings.trainer
    tables = grown_by(model)
    admitted_at_once = {"context", *(name for name, ids in tables.items() if FEW.issuperset(ids))}

    def table(name: str) -> Table:
        return table_of(
            device,
            name,
            model.tables.get(name, dim),
            CAPACITY,
            INITIAL_ACCUMULATOR,
            1 if name in admitted_at_once else trainer.admit_after,
            model.initial_ranges.get(name, HYPERPARAMETERS.first_row),
            trainer.max_rows,
        )

    # The weight and the marginal logit of a new cross are 0.
    cross = table_of(device, CROSS, WIDTH, CAPACITY, 0.0, trainer.admit_after, 0.0, CROSSES_OF_A_ROW * trainer.max_rows)
    return {**{name: table(name) for name in EMBEDDINGS}, CROSS: cross, **{name: table(name) for name in tables}}


def transitions_of(settings: Settings) -> CountTable:
    """Builds the table of what came next after each category."""
    trainer = settings.trainer
    return CountTable(
        TRANSITION,
        TRANSITION_CAPACITY,
        trainer.admit_after,
        max(trainer.max_rows // ROWS_OF_A_LIST, TRANSITION_CAPACITY),
    )


GROWN_BY = {
    "sequence_items": "item",
    "negative_item": "item",
    "sequence_categories": "category",
    "recent": "category",
    "popular": "category",
    "successor": "category",
    "other": "category",
    "negative_category": "category",
    "negative_item_attributes": "item_attributes",
}
"""By ids that look a table up, the ids that grow it instead. All other ids grow their table themselves."""

FEW = frozenset({"context", "item_attributes", "sequence_actions"})
"""Ids with so few values that each gets a row at its first occurrence, as in the table `context`."""

EMBEDDINGS = ("user", "item", "category", "context")
"""The tables of embedding rows of every ranker."""


def grown_by(model: Model) -> dict[str, tuple[str, ...]]:
    """The ids that grow each of the ranker's own tables, in the order in which its inputs name them."""
    tables: dict[str, dict[str, None]] = {name: {} for name in model.tables if name not in EMBEDDINGS}
    for input_ in model.inputs:
        if input_.table in tables:
            tables[input_.table][GROWN_BY.get(input_.ids, input_.ids)] = None
    return {name: tuple(ids) for name, ids in tables.items()}


class Growth:
    """Grows a ranker's own tables.

    A row is created for ids that occur in events, not for ids that are often looked up. An item may be in the recent
    events of a thousand users although it was clicked once. So ids of events, negatives and candidates grow a table
    only through the row's own item or category.
    """

    def __init__(self, model: Model, tables: Mapping[str, Table]) -> None:
        self._grown = [(tables[name], ids) for name, ids in grown_by(model).items()]

    def observe(self, batch: MicroBatch, context: U64, item_attributes: U64) -> None:
        """Counts one occurrence of each id, and creates the rows that are due; `context` is `[n, K]`, `item_attributes` `[n, A]`."""
        for table, names in self._grown:
            for ids in self._ids(names, batch, context, item_attributes):
                if ids.size:
                    table.observe(ids.reshape(-1), np.repeat(batch.at_ms, ids.size // len(batch)))

    def _ids(self, names: tuple[str, ...], batch: MicroBatch, context: U64, item_attributes: U64) -> Iterator[U64]:
        computed = {"context": context, "item_attributes": item_attributes}
        for name in names:
            ids = computed[name] if name in computed else getattr(batch, name)
            yield np.ascontiguousarray(ids, np.uint64)
