"""Which inputs of a program are rows of tables of the ranker's own, by the program's signature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from state.rows.tables import AVERAGED_IDS, own_rows_of


class OwnInput(NamedTuple):
    """An input that is rows of a table of the ranker's own.

    Attributes:
        name: Of the input.
        table: The table.
        ids: What looks it up, of `state.rows.tables.SERVED_IDS`.
        width: Of its rows.
        averaged: The mean of the rows is wanted.
    """

    name: str
    table: str
    ids: str
    width: int
    averaged: bool


def own_inputs(shapes: Mapping[str, tuple[int, ...]]) -> tuple[OwnInput, ...]:
    """Those of a program with inputs of these shapes.

    >>> own_inputs({"item_row": (-1, 8), "attended_of_sequence_items": (-1, 20, 4)})
    (OwnInput(name='attended_of_sequence_items', table='attended', ids='sequence_items', width=4, averaged=False),)
    """
    named = ((name, own_rows_of(name), shape[-1]) for name, shape in shapes.items())
    return tuple(OwnInput(name, *own, width, own[1] in AVERAGED_IDS) for name, own, width in named if own is not None)
