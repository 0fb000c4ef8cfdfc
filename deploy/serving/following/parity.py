"""Detects training-serving skew: compares sampled rows of the training log with features computed by serving."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from state.features.arrays import Vector
from state.features.mask import Mask
from state.features.spec import EVENT, Events, FeatureSpec, vectorise_many
from state.history.store import HistoryStore
from state.metrics import ApplierMetrics
from state.microbatch.batch import MicroBatch
from state.positions import Range, Source
from state.process.log_lines import SaidOnce

WHOLE_EXTRA = "whole"
EVERY_MS = 1000
"""An extra of the histories: the log time in ms before which they may lack events; 0 if they lack none."""

EQUAL, DIFFERS, UNKNOWN = OUTCOMES = ("equal", "differs", "unknown")
IDS = {"recent_categories", "sequence_items", "sequence_categories"}  # ids, whose values mean nothing to a reader
_log = logging.getLogger(__name__)


def differences(trained: Vector, served: Vector, spec: FeatureSpec) -> Iterator[str]:
    """Describes each difference between two rows.

    >>> spec = FeatureSpec()
    >>> one, other = (Vector(*[column[0] for column in spec.empty(1)]) for _ in range(2))
    >>> for column in (*one, *other):
    ...     column.fill(0)
    >>> other.features[0], other.recent_categories[1] = 2, 77
    >>> list(differences(one, other, spec))
    ['view.count_1h was trained as 0 and is 2 here', 'recent_categories[1] is another one here']
    """
    for name in Vector._fields:
        trained_value, served_value = getattr(trained, name), getattr(served, name)
        if trained_value.shape != served_value.shape:
            yield f"{name} was trained in shape {trained_value.shape} and has {served_value.shape} here"
            continue
        for index in np.argwhere(trained_value != served_value):
            position = (*index.tolist(),)
            if name == "features":
                called = spec.names[position[0]]
            elif name == "category_windows":
                called = f"{spec.window_names[position[1]]} of recent category {position[0] + 1}"
            else:
                called = f"{name}[{position[0]}]"
            yield (
                f"{called} is another one here"
                if name in IDS
                else f"{called} was trained as {int(trained_value[position])} and is {int(served_value[position])} here"
            )


class Parity:
    """Samples rows as they are added to the histories. Used by the thread that writes the histories.

    A row contains the windows that the stream computed before its click. When its click is added to the histories, the
    windows computed from these must be equal for the same time, bit for bit. The outcome is `unknown` if they may differ
    for a known reason: another feature spec, a mask that only one side has yet, or events that this host may lack.

    `reach_ms` is the maximum age, relative to a row, of an event that its windows cover. `choose` returns a random
    row index, given the number of rows.
    """

    def __init__(
        self,
        store: HistoryStore,
        spec: FeatureSpec,
        reach_ms: int,
        metrics: ApplierMetrics,
        now_ms: Callable[[], int],
        choose: Callable[[int], int] = random.randrange,
    ) -> None:
        self._store, self._spec, self._reach_ms = store, spec, reach_ms
        self._now_ms, self._choose = now_ms, choose
        self._counted = {outcome: metrics.parity_rows.labels(outcome) for outcome in OUTCOMES}
        self._log_once, self._compared_ms, self.mask = SaidOnce(_log.error), 0, Mask.NONE
        stored = store.extra(WHOLE_EXTRA)
        self._whole_ms = 0 if stored is None else int(json.loads(stored))
        # An earlier release did not record what its histories lack.
        self._lost = stored is None and bool(store.positions())

    def lose(self) -> None:
        """Records that the histories may lack events up to now."""
        self._lost = True

    def meet(self, ranges: Sequence[Range], marks: Mapping[Source, int], missing: int) -> None:
        """Checks a record's ranges for positions that no record covers, including those before the first range.

        `marks` has the next offset that the histories need, by source. `missing` counts positions that no record
        covered.
        """
        self._lost |= missing > 0 or any(part.first > 0 and part.source not in marks for part in ranges)

    def news(self, clock_ms: int) -> dict[str, bytes | None]:
        """Returns the extras to commit with the clicks; `clock_ms` is the log time after them."""
        if not self._lost:
            return {}
        self._whole_ms, self._lost = clock_ms, False
        return {WHOLE_EXTRA: json.dumps(clock_ms).encode()}

    @property
    def is_due(self) -> bool:
        """Whether a row of the next record is to be compared, which needs its features."""
        return not 0 <= self._now_ms() - self._compared_ms < EVERY_MS

    def compare(
        self, rows: MicroBatch, position: tuple[int, int], users: Sequence[NDArray[np.uint64]], events: Sequence[Events]
    ) -> None:
        """Compares one row of a record.

        `position` is the record's partition and offset in the training log. `users` and `events` are the parts of the
        pending commit; the last part belongs to `rows`, which has one row per event.
        """
        held_rows = np.flatnonzero(self._store.shares.has(rows.user))
        if not len(held_rows):
            return
        self._compared_ms = self._now_ms()
        if rows.header.spec != self._spec.digest:
            self._counted[UNKNOWN].inc()
            return
        row = int(held_rows[self._choose(len(held_rows))])
        user, at_ms = int(rows.user[row]), int(rows.at_ms[row])
        before = [*events[:-1], events[-1][:row]]
        pending = [part[who[: len(part)] == user] for who, part in zip(users, before, strict=True)]
        history = np.concatenate([self._store.read(user), *pending]).astype(EVENT)
        self._count(rows, row, position, self._served(history, at_ms, user))

    def _served(self, history: Events, at_ms: int, user: int) -> Vector:
        return Vector(*[column[0] for column in vectorise_many([history], [at_ms], self.mask, self._spec, [user])])

    def _count(self, rows: MicroBatch, row: int, position: tuple[int, int], served: Vector) -> None:
        trained = Vector(*[getattr(rows, name)[row] for name in Vector._fields])
        different = [*differences(trained, served, self._spec)]
        if not different:
            self._counted[EQUAL].inc()
            return
        if self._excused(rows, row):
            self._counted[UNKNOWN].inc()
            return
        self._counted[DIFFERS].inc()
        source = rows.header.ranges[int(rows.source[row])].source
        self._log_once(
            f"record {position[1]} of partition {position[0]} of the training log: the click at offset {int(rows.offset[row])} of "
            f"partition {source.partition} was trained with other features than answers have: {different[0]}"
            + (f", and {len(different) - 1} more numbers differ" if different[1:] else "")
        )

    def _excused(self, rows: MicroBatch, row: int) -> bool:
        """Whether the features may differ for a known reason."""
        is_complete = not self._lost and (not self._whole_ms or int(rows.at_ms[row]) - self._reach_ms >= self._whole_ms)
        return not is_complete or rows.header.mask_generation != self.mask.generation
