"""The newest attributes of users and items, as a worker reads them from the host's store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from state.attributes.store import AttributeStore, ids_in, texts_in
from state.attributes.values import SIDES, AttributeTable


class AttributeValues(NamedTuple):
    """What is known of one user or item.

    Attributes:
        ids: Of its attributes, A of them; none where there is nothing to know.
        texts: By name; None where the record has no such value. Empty without a record.
    """

    ids: Sequence[int]
    texts: Mapping[str, str | None]


class KnownAttributes:
    """Attributes by id; use it in one thread.

    Args:
        store: The host's attributes, read only; None without any.
        tables: By side.

    Attributes:
        names: Of the attributes by side; none of a side that has no table.
    """

    def __init__(self, store: AttributeStore | None, tables: Mapping[str, AttributeTable]) -> None:
        self._store, self._tables = store, tables
        self.names = {side: tables[side].names if store is not None and side in tables else () for side in SIDES}
        self._unknown = {side: AttributeValues(table.unknown.tolist(), {}) for side, table in tables.items()}

    def of(self, side: str, ids: Sequence[int]) -> list[AttributeValues]:
        """What is known now, in the order of `ids`."""
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
"""Where no attributes are configured."""
