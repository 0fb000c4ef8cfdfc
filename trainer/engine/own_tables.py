"""Creates and grows a custom ranker's own tables.

A row is created for ids that occur in events, not for ids that are often looked
up: an item in the recent events of a thousand users was clicked once. Ids of
events, negatives and candidates therefore grow a table only through the row's
own item or category.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from state.config.settings import Settings
from state.microbatch.batch import MicroBatch
from trainer.model.ranker import Ranker
from trainer.tables.index import U64
from trainer.tables.table import INITIAL_RANGE, Table, table_of

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


def grown_by(ranker: Ranker) -> dict[str, tuple[str, ...]]:
    """The ids that grow each of the ranker's own tables, in the order in which its inputs name them."""
    found: dict[str, dict[str, None]] = {name: {} for name in ranker.tables if name not in EMBEDDINGS}
    for one in ranker.inputs:
        if one.table in found:
            found[one.table][GROWN_BY.get(one.ids, one.ids)] = None
    return {name: tuple(ids) for name, ids in found.items()}


def own_tables(ranker: Ranker, settings: Settings, device: str | None) -> dict[str, Table]:
    """The ranker's own tables by name, empty."""
    trainer = settings.trainer
    return {
        name: table_of(
            device,
            name,
            ranker.tables[name],
            trainer.capacity,
            settings.model.initial_accumulator,
            1 if FEW.issuperset(ids) else trainer.admit_after,
            ranker.initial_ranges.get(name, INITIAL_RANGE),
            trainer.max_rows,
        )
        for name, ids in grown_by(ranker).items()
    }


class Growth:
    """Grows a ranker's own tables.

    Args:
        ranker: The ranker.
        tables: The trainer's tables by name.
    """

    def __init__(self, ranker: Ranker, tables: Mapping[str, Table]) -> None:
        self._grown = [(tables[name], ids) for name, ids in grown_by(ranker).items()]

    def observe(self, batch: MicroBatch, context: U64, item_attributes: U64) -> None:
        """Counts one occurrence of each id, and creates the rows that are due.

        Args:
            batch: n rows.
            context: `[n, K]` uint64, fields and users' attributes.
            item_attributes: `[n, A]` uint64.
        """
        for table, names in self._grown:
            for ids in self._ids(names, batch, context, item_attributes):
                if ids.size:
                    table.observe(ids.reshape(-1), np.repeat(batch.at_ms, ids.size // len(batch)))

    def _ids(self, names: tuple[str, ...], batch: MicroBatch, context: U64, item_attributes: U64) -> Iterator[U64]:
        apart = {"context": context, "item_attributes": item_attributes}
        for name in names:
            found = apart[name] if name in apart else getattr(batch, name)
            yield np.ascontiguousarray(found, np.uint64)
