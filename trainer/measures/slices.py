"""The values of attributes by which measures are taken, each with its place (`breakdown.py` has the measures).

A slice attribute has a place for whoever is unknown, one for none, one for all
values that came when its places were taken, and one for each other value in
the order in which they came. So the measures, and the labels of the metrics,
are bounded, and are a function of the log like the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from state.attributes.values import U64
from state.config.sections import Attributes
from trainer.model.attributes import Columns

I64 = npt.NDArray[np.int64]

UNKNOWN, NONE, OTHER, FIRST = 0, 1, 2, 3
SHOWN = ("(unknown)", "(none)", "(other)")


class Slices:
    """The places of the values of some attributes.

    Args:
        settings: The section `[attributes]`.
        columns: The attributes that the trainer has.
    """

    def __init__(self, settings: Attributes, columns: Columns) -> None:
        self._columns = columns
        users, items = columns.users.names, columns.items.names
        self.names = tuple(name for name in settings.slices if name in users + items)
        count, places = len(self.names), FIRST + settings.slice_values
        self._ids: U64 = np.zeros((count, places), np.uint64)
        for number, name in enumerate(self.names):
            table = columns.users if name in users else columns.items
            self._ids[number, [UNKNOWN, NONE]] = table.unknown_id(name), table.none_id(name)
        self._texts: dict[int, str] = {}

    def __bool__(self) -> bool:
        """Whether there is an attribute to measure by."""
        return bool(self.names)

    @property
    def by_item(self) -> tuple[bool, ...]:
        """Of each attribute whether it is one of items, so that a negative has that of another row."""
        return tuple(name not in self._columns.users.names for name in self.names)

    def places(self, users: U64, items: U64, texts: Mapping[int, str]) -> list[I64]:
        """The places of the rows of one step, `[n]` int64 of each attribute; values that are new take free ones.

        Args:
            users: `[n, Au]` uint64.
            items: `[n, Ai]` uint64.
            texts: Of ids that the micro-batch announces.
        """
        found = []
        for number, name in enumerate(self.names):
            mine = name in self._columns.users.names
            ids, names = (users, self._columns.users.names) if mine else (items, self._columns.items.names)
            found.append(self._places(number, ids[:, names.index(name)], texts))
        return found

    def shown(self) -> dict[str, list[str]]:
        """Of each attribute the texts of its places."""
        return {
            name: [self._text(number, place) for place in range(self._ids.shape[1])]
            for number, name in enumerate(self.names)
        }

    def _text(self, number: int, place: int) -> str:
        one = int(self._ids[number, place])
        return SHOWN[place] if place < FIRST else self._texts.get(one, f"{one:016x}")

    def _places(self, number: int, ids: U64, texts: Mapping[int, str]) -> I64:
        """The place of each of `[n]` ids; new ones take a free one in the order in which they come."""
        known = {one: place for place, one in enumerate(self._ids[number].tolist()) if one}
        found = np.empty(len(ids), np.int64)
        for row, one in enumerate(ids.tolist()):
            place = known.get(one)
            if place is None:
                # Of no item (0) there is nothing to tell.
                place = UNKNOWN if one == 0 else len(known) + 1 if len(known) + 1 < self._ids.shape[1] else OTHER
                if place >= FIRST:
                    self._ids[number, place] = one
                    known[one] = place
            found[row] = place
            if place >= FIRST and one in texts:
                self._texts[one] = texts[one]
        return found

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The values and their texts, for a version; nothing where there is no attribute to measure by."""
        if not self:
            return {}
        texts = {f"{one:016x}": text for one, text in sorted(self._texts.items())}
        about = json.dumps([self.names, texts]).encode()
        return {"about": np.frombuffer(about, np.uint8), "ids": self._ids.copy()}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Sets what `state` returned; those of other attributes than these are not taken over."""
        if not self or "about" not in state:
            return
        names, texts = json.loads(state["about"].tobytes())
        if tuple(names) != self.names or state["ids"].shape != self._ids.shape:
            return
        self._texts = {int(one, 16): text for one, text in texts.items()}
        self._ids = np.array(state["ids"])
