"""Attributes in a training step: rows of the context table, for the tower (users) and added to the item's row (items).

The mean of a user's attributes and the context fields is an input of the tower. The mean of an item's attributes is
added to the item's row, which only the engagement head reads.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from state.attributes.values import U64, AttributeTable
from state.compiled import mixed
from state.config.sections import Attributes
from state.config.sources import fields_of
from state.microbatch.batch import MicroBatch
from state.ranking.crosses import Values
from trainer.tables.index import I32


class Combined(NamedTuple):
    """The distinct combinations of item and attributes in a step.

    Attributes:
        item: `[c]` uint64.
        attributes: `[c, Ai]` uint64.
        at: `[n]` int32, the combination of each row.
    """

    item: U64
    attributes: U64
    at: I32


class Columns:
    """The tables of the attributes that the trainer learns from; without fields if a side has no topic."""

    def __init__(self, settings: Attributes) -> None:
        self.users = AttributeTable("user", fields_of(settings.user_fields if settings.user_topic else ()))
        self.items = AttributeTable("item", fields_of(settings.item_fields if settings.item_topic else ()))

    def users_of(self, batch: MicroBatch) -> U64:
        """Users' attributes, `[n, Au]` uint64, in the order of the settings."""
        return _arranged(batch.user_attributes, batch.header.attributes[0], self.users)

    def items_of(self, batch: MicroBatch) -> U64:
        """Items' attributes, `[n, Ai]` uint64, in the order of the settings."""
        return _arranged(batch.item_attributes, batch.header.attributes[1], self.items)

    def values_of(self, batch: MicroBatch) -> Values:
        """The columns from which `Crosses` computes ids, with attributes in the order of the settings."""
        return Values(
            user=batch.user,
            item=batch.item,
            category=batch.category,
            context=batch.context,
            user_attributes=self.users_of(batch),
            item_attributes=self.items_of(batch),
            features=batch.features,
            latest_items=batch.sequence_items,
        )


def _arranged(columns: U64, names: tuple[str, ...], table: AttributeTable) -> U64:
    """The columns that `table` names. Columns that a micro-batch of older settings lacks are unknown."""
    if names == table.names:
        return columns
    arranged = np.tile(table.unknown, (len(columns), 1))
    for column, name in enumerate(table.names):
        if name in names:
            arranged[:, column] = columns[:, names.index(name)]
    return arranged


def combine(item: U64, attributes: U64) -> Combined:
    """The distinct combinations of `[n]` items and their `[n, Ai]` attributes, in an order that depends on ids alone.

    >>> found = combine(np.array([5, 5, 5], np.uint64), np.array([[1], [2], [1]], np.uint64))
    >>> found.item.tolist(), bool(found.at[0] == found.at[2] != found.at[1])
    ([5, 5], True)
    """
    keys = _mixed(item)
    for column in attributes.T:
        keys = _mixed(keys ^ column)
    _, first, at = np.unique(keys, return_index=True, return_inverse=True)
    return Combined(item[first], np.ascontiguousarray(attributes[first]), at.astype(np.int32))


def _mixed(x: U64) -> U64:
    """One output of the generator SplitMix64 (Steele, Lea and Flood 2014) from each value."""
    return mixed(x + np.uint64(0x9E3779B97F4A7C15))
