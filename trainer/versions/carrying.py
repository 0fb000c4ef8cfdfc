"""Decides what another model, feature spec or release carries over from a version, and what starts from scratch. Pure.

A table is carried over if it keeps its name and width, a dense weight if it keeps its name and shape; the optimizer's
slots follow it. Counters, metrics, popular categories and transition counts are facts of the log and always carried over.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from state.rows.tables import tables_in
from trainer.versions.content import COLUMNS, QUALITY, Array, Tensors

_POWERS = "slots.powers"
_MOVING = "slots.moving."
_GUARD = "state.guard."


@dataclass(frozen=True, slots=True)
class CarriedTable:
    """A table before and after.

    Attributes:
        rows: The number of its rows in the version.
        was: Their width; None if the version has no such table.
        now: Their width now; None if the model reads no such table.
    """

    name: str
    rows: int
    was: int | None
    now: int | None

    @property
    def goes_on(self) -> bool:
        """Whether its rows are kept."""
        return self.was == self.now

    def __str__(self) -> str:
        """The table's outcome as text.

        >>> str(CarriedTable("user", 1200, 32, 32)), str(CarriedTable("user", 1200, 32, 16))
        ('user: 1,200 rows of width 32', 'user: 1,200 rows of width 32, the width is now 16')
        """
        rows = None if self.was is None else f"{self.rows:,} rows of width {self.was}"
        return fate(self.name, rows, "width", None if self.now is None else str(self.now), self.goes_on)


@dataclass(frozen=True, slots=True)
class CarriedWeight:
    """A dense weight before and after.

    Attributes:
        was: Its shape; None if the version has none.
        now: Its shape now; None if the model has none.
    """

    name: str
    was: tuple[int, ...] | None
    now: tuple[int, ...] | None

    @property
    def goes_on(self) -> bool:
        """Whether its numbers are kept."""
        return self.was == self.now

    def __str__(self) -> str:
        """The weight's outcome as text.

        >>> str(CarriedWeight("query.bias", None, (8,))), str(CarriedWeight("query.bias", (8,), (4,)))
        ('query.bias: the version has none', 'query.bias: 8, the shape is now 4')
        """
        was, now = (None if shape is None else shown(shape) for shape in (self.was, self.now))
        return fate(self.name, was, "shape", now, self.goes_on)


@dataclass(frozen=True, slots=True)
class Carrying:
    """What is carried over, and what starts from scratch.

    Attributes:
        tables: Of the version and of the model, in the order of the model's, then by name.
        weights: Of the version and of the model, in the same order.
        steps: Steps that the version counted.
        trained: Rows learned from that the version counted.
        popular: The version's number of popular categories.
    """

    tables: tuple[CarriedTable, ...]
    weights: tuple[CarriedWeight, ...]
    steps: int = 0
    trained: int = 0
    popular: int = 0

    @property
    def anew(self) -> tuple[CarriedTable | CarriedWeight, ...]:
        """The tables and weights that start from scratch."""
        return (*self.tables_anew, *(one for one in self.weights if not one.goes_on))

    @property
    def tables_anew(self) -> tuple[CarriedTable, ...]:
        """The tables that start from scratch."""
        return tuple(one for one in self.tables if not one.goes_on)

    def wanting(self, optional: Collection[str] = ()) -> tuple[CarriedTable | CarriedWeight, ...]:
        """What keeps a trainer from loading the version as is: all that starts from scratch but `optional` tables."""
        return tuple(one for one in self.anew if not (isinstance(one, CarriedTable) and one.name in optional))

    def lines(self) -> list[str]:
        """The plan as text: each table, a summary of the weights, each weight that starts from scratch."""
        weights = [one for one in self.weights if one.goes_on]
        numbers = sum(int(np.prod(one.was or ())) for one in weights)
        said = ["carried over:", *(f"  table {one}" for one in self.tables if one.goes_on)]
        now = sum(one.now is not None for one in self.weights)
        said += [
            f"  {len(weights)} of {now} dense weights, {numbers:,} numbers, with their optimizer's slots",
            f"  the counts of {self.steps:,} steps and {self.trained:,} rows, {self.popular:,} popular categories, "
            "and all measures",
        ]
        if not self.anew:
            return [*said, "begins anew: nothing"]
        said.append("begins anew:")
        said += [f"  {'table' if isinstance(one, CarriedTable) else 'weight'} {one}" for one in self.anew]
        if any(isinstance(one, CarriedWeight) for one in self.anew):
            said.append("  the guard's running loss, with the weights")
        return said

    def document(self) -> dict[str, Any]:
        """As JSON values, for control."""
        return {
            "tables": {one.name: one.rows for one in self.tables if one.goes_on},
            "weights": sum(one.goes_on for one in self.weights),
            "anew": [str(one) for one in self.anew],
        }


def fate(name: str, was: str | None, measure: str, now: str | None, goes_on: bool) -> str:
    """The outcome of a table or a weight as text.

    Args:
        name: Its name.
        was: Its description in the version; None if the version has none.
        measure: The property that must stay the same for it to be carried over.
        now: That property in the model; None if the model has none.
        goes_on: Whether it is carried over.

    >>> fate("item", "7 rows of width 32", "width", None, goes_on=False)
    'item: 7 rows of width 32, no longer read'
    """
    if was is None:
        return f"{name}: the version has none"
    change = "no longer read" if now is None else f"the {measure} is now {now}"
    return f"{name}: {was}" if goes_on else f"{name}: {was}, {change}"


def shown(shape: tuple[int, ...]) -> str:
    """A shape as text.

    >>> shown((128, 256)), shown(())
    ('128x256', 'a number')
    """
    return "x".join(map(str, shape)) or "a number"


def plan(old: Tensors, fresh: Tensors) -> Carrying:
    """Plans what a model carries over from the full state `old`.

    Args:
        old: The full state, as a base holds it.
        fresh: The full state of the untrained model; of its tables and weights only names and shapes count.
    """
    tables = tuple(
        CarriedTable(name, len(old.get(f"{name}.ids", ())), _width(name, old), _width(name, fresh))
        for name in _united(tables_in(fresh), tables_in(old))
        if _width(name, old) is not None or _width(name, fresh) is not None
    )
    weights = tuple(
        CarriedWeight(name, _shape(f"dense.{name}", old), _shape(f"dense.{name}", fresh))
        for name in _united(_under("dense.", fresh), _under("dense.", old))
    )
    steps, trained = (int(old.get(f"state.counters.{name}", np.int64(0))) for name in ("steps", "trained"))
    return Carrying(tables, weights, steps, trained, len(old.get("state.popular.ids", ())))


def carried(old: Tensors, fresh: Tensors, planned: Carrying, fast: Collection[str] = ()) -> dict[str, Array]:
    """The full state with which a trainer continues.

    Args:
        old: As for `plan`.
        fresh: As for `plan`.
        planned: Their plan.
        fast: Names of the weights whose slots are kept together, as `moving.`.
    """
    kept_weights = {one.name for one in planned.weights if one.goes_on}
    all_kept = all(one.goes_on for one in planned.weights if one.now is not None)
    found: dict[str, Array] = {}
    # 1. Tables.
    for table in planned.tables:
        if table.now is not None:
            source = old if table.goes_on else fresh
            found |= {f"{table.name}.{column}": source[f"{table.name}.{column}"] for column in COLUMNS}
    # 2. Dense weights, and the slots that belong to them.
    for name in _under("dense.", fresh):
        source = old if name in kept_weights else fresh
        found[f"dense.{name}"] = source[f"dense.{name}"]
    moving = [name for name in fresh if name.startswith(_MOVING)]
    moves_on = set(fast) <= kept_weights and all(_shape(name, old) == _shape(name, fresh) for name in moving)
    for name in _under("slots.", fresh):
        slot = f"slots.{name}"
        if slot == _POWERS:
            # A new weight has no warm-up: with the old powers its first steps would be three times too long.
            goes_on = all_kept
        elif slot.startswith(_MOVING):
            goes_on = moves_on
        else:
            goes_on = name.rpartition(".")[0] in kept_weights
        found[slot] = old[slot] if goes_on and _shape(slot, old) == _shape(slot, fresh) else fresh[slot]
    # 3. Facts of the log. The guard's running loss is a property of the weights.
    for name, tensor in old.items():
        if name.startswith(("state.", QUALITY)):
            found[name] = tensor if all_kept or not name.startswith(_GUARD) else fresh[name]
    return found


def removals(old: Tensors, fresh: Tensors, planned: Carrying) -> dict[str, Array]:
    """The first version's entries for tables that start from scratch: the removed ids, which serving must not find.

    When `content.merge` applies them to `old`, nothing of such a table is left. A table that is no longer read stays as
    a table of width 0.
    """
    found: dict[str, Array] = {}
    for table in planned.tables_anew:
        if table.was is None:
            continue
        if table.now is None:
            empty = {name: old[f"{table.name}.{name}"][:0] for name in COLUMNS}
            nothing = np.zeros((0, 0), np.float32)
            found |= {f"{table.name}.{name}": column for name, column in (empty | {"rows": nothing}).items()}
        else:
            found |= {f"{table.name}.{name}": fresh[f"{table.name}.{name}"] for name in COLUMNS}
        found[f"{table.name}.removed"] = np.sort(old[f"{table.name}.ids"])
    return found


def _width(table: str, tensors: Tensors) -> int | None:
    """The width of a table's rows; None if there is no such table, or an upgrade dropped it."""
    if f"{table}.ids" not in tensors:
        return None
    return tensors[f"{table}.rows"].shape[1] or None


def _shape(name: str, tensors: Tensors) -> tuple[int, ...] | None:
    return tensors[name].shape if name in tensors else None


def _under(prefix: str, tensors: Mapping[str, Any]) -> Iterator[str]:
    return (name.removeprefix(prefix) for name in tensors if name.startswith(prefix))


def _united(ours: Collection[str] | Iterator[str], theirs: Collection[str] | Iterator[str]) -> list[str]:
    first = list(ours)
    return [*first, *sorted(set(theirs) - set(first))]
