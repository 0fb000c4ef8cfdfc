"""Assigns slices to attribute values, and keeps their sums.

An attribute has one slice for unknown values and one for no value. Each of the first other values gets its own slice, in
the order of occurrence. All further values share one slice. So the slices are bounded, and a function of the log.

The sums are part of a version's digest since 0.1.0. The metrics of versions are those of `breakdown.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from state.attributes.values import U64
from state.config.sections import Attributes
from trainer.measures.evaluation import bins_of, fade
from trainer.model.attributes import Columns

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

BINS = 64
UNKNOWN, NONE, OTHER, FIRST = 0, 1, 2, 3
SHOWN = ("(unknown)", "(none)", "(other)")
SUMS = ("rows", "targets", "log_loss", "top1", "pairs", "engagement_log_loss")


class Scored(NamedTuple):
    """The scores of a step before learning.

    Attributes:
        targets: `[n]` bool, the rows with a category.
        log_loss: `[t]` float32 interest log loss of those.
        top1: `[t]` bool, whether the best candidate was the category.
        pairs: `[2 n]` bool, the scored pairs, of rows and then of their negatives.
        partner: `[n]` int64, the row whose item is the negative.
        logits: `[m]` float32, of the scored pairs.
        positive: `[m]` bool, their outcomes.
        engagement_log_loss: `[m]` float32.
    """

    targets: npt.NDArray[np.bool_]
    log_loss: F32
    top1: npt.NDArray[np.bool_]
    pairs: npt.NDArray[np.bool_]
    partner: I64
    logits: F32
    positive: npt.NDArray[np.bool_]
    engagement_log_loss: F32


class Slices:
    """The running metrics of the values of some attributes."""

    def __init__(self, settings: Attributes, columns: Columns) -> None:
        self._columns = columns
        users, items = columns.users.names, columns.items.names
        self.names = tuple(name for name in settings.slices if name in users + items)
        count, size = len(self.names), FIRST + settings.slice_values
        self._ids: U64 = np.zeros((count, size), np.uint64)
        for number, name in enumerate(self.names):
            table = columns.users if name in users else columns.items
            self._ids[number, [UNKNOWN, NONE]] = table.unknown_id(name), table.none_id(name)
        self._texts: dict[int, str] = {}
        self._total: F64 = np.zeros((count, size))
        self._sums: F64 = np.zeros((count, size, len(SUMS)))
        self._bins: F64 = np.zeros((count, size, 2, BINS))

    def __bool__(self) -> bool:
        return bool(self.names)

    @property
    def by_item(self) -> tuple[bool, ...]:
        """Whether each attribute is one of items. A negative then has the value of another row."""
        return tuple(name not in self._columns.users.names for name in self.names)

    def update(self, users: U64, items: U64, texts: Mapping[int, str], scored: Scored) -> list[I64]:
        """Adds the rows of one step; returns, for each attribute, the slice of each row, `[n]` int64.

        `users` is `[n, Au]`, `items` `[n, Ai]`; `texts` has the texts of the ids that the micro-batch announces.
        """
        for sums in (self._sums, self._bins):
            fade(sums, scored.log_loss.size)
        slices = []
        for number, name in enumerate(self.names):
            is_of_user = name in self._columns.users.names
            ids = (
                users[:, self._columns.users.names.index(name)]
                if is_of_user
                else (items[:, self._columns.items.names.index(name)])
            )
            slots = self._places(number, ids, texts)
            other = slots if is_of_user else slots[scored.partner]
            self._add(number, slots, np.concatenate([slots, other])[scored.pairs], scored)
            slices.append(slots)
        return slices

    def shown(self) -> dict[str, list[str]]:
        """The texts of each attribute's slices."""
        return {
            name: [self._text(number, value) for value in range(self._ids.shape[1])]
            for number, name in enumerate(self.names)
        }

    def _text(self, number: int, value: int) -> str:
        identity = int(self._ids[number, value])
        return SHOWN[value] if value < FIRST else self._texts.get(identity, f"{identity:016x}")

    def _places(self, number: int, ids: U64, texts: Mapping[int, str]) -> I64:
        """The slice of each of `[n]` ids; new ids take a free slice in the order of their occurrence."""
        known = {identity: value for value, identity in enumerate(self._ids[number].tolist()) if identity}
        values = np.empty(len(ids), np.int64)
        for row, identity in enumerate(ids.tolist()):
            value = known.get(identity)
            if value is None:
                # A row without an item has id 0, which is unknown.
                value = UNKNOWN if identity == 0 else len(known) + 1 if len(known) + 1 < self._ids.shape[1] else OTHER
                if value >= FIRST:
                    self._ids[number, value] = identity
                    known[identity] = value
            values[row] = value
            if value >= FIRST and identity in texts:
                self._texts[identity] = texts[identity]
        return values

    def _add(self, number: int, slots: I64, paired: I64, scored: Scored) -> None:
        count, aimed = self._ids.shape[1], slots[scored.targets]

        def by(at: I64, weights: Any = None) -> F64:
            return np.bincount(at, weights, minlength=count).astype(np.float64)

        rows = by(slots)
        self._total[number] += rows
        columns = (
            rows, by(aimed), by(aimed, scored.log_loss), by(aimed, scored.top1), by(paired),
            by(paired, scored.engagement_log_loss),
        )  # fmt: skip
        self._sums[number] += np.stack(columns, 1)
        cells = (paired * 2 + scored.positive) * BINS + bins_of(scored.logits, BINS)
        self._bins[number] += np.bincount(cells, minlength=count * 2 * BINS).reshape(count, 2, BINS)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """All sums, to be stored in a version; empty without slice attributes."""
        if not self:
            return {}
        texts = {f"{identity:016x}": text for identity, text in sorted(self._texts.items())}
        document = json.dumps([self.names, texts]).encode()
        return {
            "about": np.frombuffer(document, np.uint8),
            "ids": self._ids.copy(),
            "total": self._total.copy(),
            "sums": self._sums.copy(),
            "bins": self._bins.copy(),
        }

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restores what `state` returned; sums of other attributes are ignored."""
        if not self or "about" not in state:
            return
        names, texts = json.loads(state["about"].tobytes())
        if tuple(names) != self.names or state["ids"].shape != self._ids.shape:
            return
        self._texts = {int(identity, 16): text for identity, text in texts.items()}
        self._ids, self._total = np.array(state["ids"]), np.array(state["total"])
        self._sums, self._bins = np.array(state["sums"]), np.array(state["bins"])
