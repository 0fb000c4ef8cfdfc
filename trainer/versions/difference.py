"""Finds the first difference between two full states of a trainer: its table, id and position. Pure functions.

Both are tensors by name as a base holds them, rows ordered by id. The comparison is
of bits, so a NaN equals itself and minus zero does not equal zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from state.config.sections import Model
from state.registry.model_fit import FORMER_TOWERS
from state.rows.tables import tables_in
from trainer.versions.content import ADDED, BESIDE, COLUMNS, PENDING, ROWS, Array, Tensors


@dataclass(frozen=True, slots=True)
class Difference:
    """The first difference of two states.

    Attributes:
        table: The table, or the tensor's name if it belongs to none.
        field: The table's column; empty for other tensors.
        id: The row's id; None for other tensors.
        position: The index in the row or in the flattened tensor; None if the whole differs.
        kept: The version's value, as text.
        recomputed: The recomputed value, as text.
    """

    table: str
    field: str
    id: int | None
    position: int | None
    kept: str
    recomputed: str

    def __str__(self) -> str:
        """The difference in one line.

        >>> str(Difference("user", "rows", 7, 2, "0.5", "0.25"))
        'user, id 0000000000000007, rows[2]: the version has 0.5, recomputed 0.25'
        """
        where = [self.table] if self.id is None else [self.table, f"id {self.id:016x}"]
        at = "" if self.position is None else f"[{self.position}]"
        if self.field:
            where.append(self.field + at)
        else:
            where[-1] += at
        return f"{', '.join(where)}: the version has {self.kept}, recomputed {self.recomputed}"


def first_difference(kept: Tensors, recomputed: Tensors) -> Difference | None:
    """The first difference of the states: tables in their order, then everything else by name; None if they are equal.

    Tensors that do not affect learning (BESIDE) are not compared, because older releases lack them. Item lists and the item
    score (ADDED) are compared only if both states have them.
    """
    if not all(any(name.startswith(ADDED) for name in side) for side in (kept, recomputed)):
        kept, recomputed = (
            {name: tensor for name, tensor in side.items() if not name.startswith(ADDED)} for side in (kept, recomputed)
        )
    tables = tables_in(kept.keys() | recomputed.keys())
    for table in tables:
        difference = _of_table(table, kept, recomputed)
        if difference is not None:
            return difference
    tabled = {f"{table}.{name}" for table in tables for name in COLUMNS}
    for name in sorted(name for name in (kept.keys() | recomputed.keys()) - tabled if not name.startswith(BESIDE)):
        if name not in kept or name not in recomputed:
            return Difference(name, "", None, None, _presence(name in kept), _presence(name in recomputed))
        at = _unequal(kept[name], recomputed[name])
        if at is not None:
            return _at("", None, name, at, kept[name], recomputed[name])
    return None


def _of_table(table: str, kept: Tensors, recomputed: Tensors) -> Difference | None:
    present = [side for side in (kept, recomputed) if f"{table}.ids" in side]
    if len(present) < 2:
        # A release without this table wrote nothing of it, which equals an empty one.
        if all(len(side[f"{table}.{name}"]) == 0 for side in present for name in ("ids", "pending_ids")):
            return None
        return Difference(table, "", None, None, _presence(present[0] is kept), _presence(present[0] is recomputed))
    for ids_name, columns in (("ids", ROWS), ("pending_ids", PENDING[1:])):
        ids, other = kept[f"{table}.{ids_name}"], recomputed[f"{table}.{ids_name}"]
        kind = "row" if ids_name == "ids" else "sightings"
        # The lowest id that only one side has.
        alone = np.setxor1d(ids, other)
        if len(alone):
            in_kept = bool(np.isin(alone[0], ids))
            return Difference(table, kind, int(alone[0]), None, _presence(in_kept), _presence(not in_kept))
        order, other_order = np.argsort(ids, kind="stable"), np.argsort(other, kind="stable")
        for column in columns:
            kept_column, other_column = kept[f"{table}.{column}"][order], recomputed[f"{table}.{column}"][other_order]
            at = _unequal(kept_column, other_column)
            if at is not None:
                width = kept_column[0].size if len(kept_column) else 1
                row = int(ids[order][(at or 0) // width]) if at >= 0 else None
                return _at(table, row, column, at, kept_column, other_column, width)
    return None


def _unequal(a: Array, b: Array) -> int | None:
    """The flat position of the first element with other bits; -1 if type or shape differ, None if all are equal."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return -1
    if a.tobytes() == b.tobytes():
        return None
    first, second = (np.ascontiguousarray(column).reshape(-1) for column in (a, b))
    size = first.dtype.itemsize
    bits = first.view(np.uint8).reshape(-1, size) != second.view(np.uint8).reshape(-1, size)
    return int(np.argmax(bits.any(axis=1)))


def _at(table: str, row: int | None, name: str, at: int, a: Array, b: Array, width: int = 1) -> Difference:
    if at < 0:
        shapes = [f"{column.dtype}{list(column.shape)}" for column in (a, b)]
        return Difference(table or name, name if table else "", row, None, *shapes)
    position = at % width if table else at
    values = [repr(np.ascontiguousarray(column).reshape(-1)[at].item()) for column in (a, b)]
    return Difference(table or name, name if table else "", row, position, *values)


def _presence(is_present: bool) -> str:
    return "it" if is_present else "nothing"


def environment_differences(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The differences between two environments, one line each; a name that only one of them has is left out.

    >>> environment_differences({"numpy": "2.3", "device": "/CPU:0"}, {"numpy": "2.4", "device": "/CPU:0"})
    ['numpy was 2.3 and is 2.4']
    >>> environment_differences({"churn.days": "7.0"}, {})
    ['churn.days was 7.0 and is off']
    >>> environment_differences({"model.tower": FORMER_TOWERS[0]}, {"model.tower": Model().tower})
    []
    """
    then = {name: Model().tower if value in FORMER_TOWERS else value for name, value in then.items()}
    # Settings of a feature that is off are not named.
    off = {name: "off" for name in then.keys() | now.keys() if name.startswith("churn.")}
    then, now = {**off, **then}, {**off, **now}
    return [
        f"{name} was {then[name]} and is {now[name]}"
        for name in sorted(then.keys() & now.keys())
        if then[name] != now[name]
    ]


def marks_difference(kept: Mapping[Any, int], recomputed: Mapping[Any, int]) -> Difference | None:
    """The first source whose next offset differs.

    >>> str(marks_difference({"a": 1, "b": 2}, {"a": 1}))
    'marks of b: the version has 2, recomputed nothing'
    """
    for source in sorted(kept.keys() | recomputed.keys()):
        values = [str(marks.get(source, "nothing")) for marks in (kept, recomputed)]
        if values[0] != values[1]:
            return Difference(f"marks of {source}", "", None, None, *values)
    return None
