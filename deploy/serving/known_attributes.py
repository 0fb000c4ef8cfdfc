"""Reads the newest attributes of users and items from the host's store, for a worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from state.attributes.store import AttributeStore, ids_in, texts_in
from state.attributes.values import SIDES, AttributeTable


class AttributeValues(NamedTuple):
    """The attributes of one user or item.

    Attributes:
        ids: The ids of its A attribute values; empty if no attributes are configured.
        texts: The values by name; None for a value that the record lacks. Empty without a record.
    """

    ids: Sequence[int]
    texts: Mapping[str, str | None]


class KnownAttributes:
    """Looks up attributes by id. Used by one thread.

    Args:
        store: The host's attributes, opened read-only; None if there are none.
        tables: The attribute tables by side (user or item).

    Attributes:
        names: The names of the attributes by side; empty for a side without a table.
    """

    def __init__(self, store: AttributeStore | None, tables: Mapping[str, AttributeTable]) -> None:
        self._store, self._tables = store, tables
        self.names = {side: tables[side].names if store is not None and side in tables else () for side in SIDES}
        self._unknown = {side: AttributeValues(table.unknown.tolist(), {}) for side, table in tables.items()}

    def of(self, side: str, ids: Sequence[int]) -> list[AttributeValues]:
        """Returns the current attributes, in the order of `ids`."""
        table = self._tables.get(side)
        if table is None or self._store is None:
            return [AttributeValues((), {})] * len(ids)
        width, found = len(table.names), []
        for value in self._store.read_many(side, ids):
            if value is None:
                found.append(self._unknown[side])
            else:
                texts = dict(zip(table.names, texts_in(value, width), strict=True))
                found.append(AttributeValues(ids_in(value, width).tolist(), texts))
        return found


NOTHING = KnownAttributes(None, {})
"""Used if no attributes are configured."""
