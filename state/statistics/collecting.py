"""Collects statistics of training rows: mergeable, and deterministic given the rows and their batches.

    action, category, item       ids of an event; of items only the most frequent are stored
    user                         number of distinct users; no id is stored
    context.NAME                 ids of `events.context`
    user_attributes.NAME         ids of attribute values that were joined to the row; none for an unknown user
    item_attributes.NAME         likewise
    label                        engagement label of rows that are trained on, from 0 to 1
    delay_s                      how much later than the event its label became known
    features.NAME                each integer of the feature spec

An event counts once, in the row where it happened. Its label and its delay count
in the row where they became known (`state/microbatch/row_kinds.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tfx_bsl.sketches import KmvSketch, MisraGriesSketch

from state.attributes.values import AttributeTable
from state.microbatch.columns import ATTRIBUTES, Columns
from state.microbatch.row_kinds import happened, trained

BUCKETS = 4096
DISTINCT_BUCKETS = 2048


class Categorical:
    """Counts the ids of one feature; 0 is a missing value.

    Args:
        listed: Whether the most frequent values are stored. For users only the number of distinct ids is.

    >>> counted = Categorical()
    >>> counted.add(np.array([7, 9, 7, 0], np.uint64))
    >>> counted.rows, counted.missing, counted.frequent(), counted.distinct
    (4, 1, [(7, 2.0), (9, 1.0)], 2)
    """

    def __init__(self, listed: bool = True) -> None:
        self.rows = self.missing = 0
        self._listed = listed
        self._frequent = MisraGriesSketch(BUCKETS)
        self._different = KmvSketch(DISTINCT_BUCKETS)

    def add(self, ids: NDArray[np.uint64]) -> None:
        """Counts `[n]` uint64 ids."""
        found, counts = np.unique(ids, return_counts=True)
        self.rows += len(ids)
        if len(found) and found[0] == 0:
            self.missing += int(counts[0])
            found, counts = found[1:], counts[1:]
        if not len(found):
            return
        values = pa.array(found.view(np.int64))
        self._different.AddValues(values)
        if self._listed:
            self._frequent.AddValues(values, pa.array(counts.astype(np.float32)))

    def merge(self, other: Categorical) -> None:
        """Adds the counts of `other`, which does not change."""
        self.rows += other.rows
        self.missing += other.missing
        self._frequent.Merge(other._frequent)
        self._different.Merge(other._different)

    @property
    def distinct(self) -> int:
        """Estimated number of distinct values, exact up to about two thousand."""
        return int(self._different.Estimate())

    def frequent(self, most: int = BUCKETS) -> list[tuple[int, float]]:
        """The most frequent values with their counts, highest count first, lower id first among equals."""
        estimate: Any = self._frequent.Estimate()
        if not len(estimate):
            return []
        values: Sequence[bytes] = estimate.field("values").to_pylist()
        counts: Sequence[float] = estimate.field("counts").to_pylist()
        # The sketch returns an id as a signed decimal number.
        found = [(int(value) % 2**64, count) for value, count in zip(values, counts, strict=True)]
        return sorted(found, key=lambda entry: (-entry[1], entry[0]))[:most]


WHOLE = np.array([*range(8), *(8 * 2**octave * quarter // 4 for octave in range(13) for quarter in range(4, 8)), 65536])
"""`[61]` int64 bounds of the buckets of whole numbers from 0 to 65,535; a bucket includes its lower bound."""

SHARES = np.linspace(0.0, 1.0, 11)
"""`[11]` float64 bounds of the buckets of numbers from 0 to 1; the last bucket includes both of its bounds."""

_BUCKET_OF = np.repeat(np.arange(len(WHOLE) - 1, dtype=np.int64), np.diff(WHOLE))


class Numeric:
    """Statistics of D features with the same rows.

    Args:
        width: D.
        edges: Bounds of the buckets: `WHOLE` or `SHARES`.

    Attributes:
        rows: Number of rows.
        missing: `[D]` int64, rows in which the feature had no value.
        counts: `[D, buckets]` int64.
        total: `[D]` float64, sum of the values.
        squares: `[D]` float64, sum of their squares.
        zeros: `[D]` int64, number of zeros.
        least: `[D]` float64, minimum; infinite if there was no value.
        most: `[D]` float64, maximum; likewise.

    >>> counted = Numeric(2)
    >>> counted.add(np.array([[1, 300], [1, 0]], np.uint16))
    >>> counted.counts[:, :2].tolist(), counted.total.tolist(), counted.most.tolist()
    ([[0, 2], [1, 0]], [2.0, 300.0], [1.0, 300.0])
    """

    def __init__(self, width: int, edges: NDArray[np.int64] | NDArray[np.float64] = WHOLE) -> None:
        self.edges = edges
        self.rows = 0
        self.missing = np.zeros(width, np.int64)
        self.counts = np.zeros((width, len(edges) - 1), np.int64)
        self.total, self.squares = np.zeros(width), np.zeros(width)
        self.zeros = np.zeros(width, np.int64)
        self.least, self.most = np.full(width, np.inf), np.full(width, -np.inf)
        self._first = np.arange(width, dtype=np.int64) * (len(edges) - 1)

    def add(self, values: NDArray[np.uint16]) -> None:
        """Counts `[n, D]` uint16 values without missing ones."""
        if not len(values):
            return
        self.rows += len(values)
        buckets = _BUCKET_OF[values] + self._first
        self.counts += np.bincount(buckets.reshape(-1), minlength=self.counts.size).reshape(self.counts.shape)
        self.total += values.sum(axis=0, dtype=np.int64)
        wide = values.astype(np.float64)
        # Sums of whole numbers up to 2**53 are exact, so they do not depend on the order.
        self.squares += (wide * wide).sum(axis=0)
        self.zeros = self.counts[:, 0].copy()
        self.least = np.minimum(self.least, values.min(axis=0))
        self.most = np.maximum(self.most, values.max(axis=0))

    def add_reals(self, values: NDArray[np.float64]) -> None:
        """Counts `[n]` float64 of a single feature; NaN is missing. Values outside all buckets count in the nearest."""
        there = values[~np.isnan(values)]
        self.rows += len(values)
        self.missing += len(values) - len(there)
        if not len(there):
            return
        inside = np.clip(np.searchsorted(self.edges, there, side="right") - 1, 0, len(self.edges) - 2)
        self.counts[0] += np.bincount(inside, minlength=self.counts.shape[1])
        self.total += there.sum()
        self.squares += np.dot(there, there)
        self.zeros += np.count_nonzero(there == 0)
        self.least, self.most = np.minimum(self.least, there.min()), np.maximum(self.most, there.max())

    def merge(self, other: Numeric) -> None:
        """Adds the counts of `other`."""
        self.rows += other.rows
        for name in ("missing", "counts", "total", "squares", "zeros"):
            getattr(self, name).__iadd__(getattr(other, name))
        self.least, self.most = np.minimum(self.least, other.least), np.maximum(self.most, other.most)


def median(counts: NDArray[np.int64], edges: NDArray[np.int64] | NDArray[np.float64]) -> float:
    """The median of a histogram, as if the values of a bucket were evenly distributed in it.

    Args:
        counts: `[buckets]` int64, not all 0.
        edges: `[buckets + 1]`, bounds of the buckets.

    >>> median(np.array([2, 2]), np.array([0, 10, 30]))
    10.0
    """
    upto = np.concatenate([[0], np.cumsum(counts)])
    return float(np.interp(upto[-1] / 2, upto, edges))


USER, ACTION, ITEM = "user", "action", "item"
CATEGORY, LABEL, DELAY = "category", "label", "delay_s"
FEATURES = "features"
LONGEST_DELAY_S = 65_535


@dataclass
class Statistics:
    """Statistics of some rows.

    Attributes:
        actions: Names of the actions, in the order of their numbers.
        names: Names of the D features of the spec.
        context: Names of the K fields of `events.context`.
        rows: Number of events, each counted once.
        categorical: Statistics of ids, by feature name.
        label: Statistics of the label.
        delay: Statistics of the delay in whole seconds.
        features: Statistics of the D features.
    """

    actions: Sequence[str]
    names: Sequence[str]
    context: Sequence[str] = ()
    rows: int = 0
    categorical: dict[str, Categorical] = field(default_factory=dict)
    label: Numeric = field(default_factory=lambda: Numeric(1, SHARES))
    delay: Numeric = field(default_factory=lambda: Numeric(1))
    features: Numeric = field(init=False)

    def __post_init__(self) -> None:
        self.features = Numeric(len(self.names))

    def add(self, columns: Columns, attributes: Sequence[Sequence[str]] = ((), ())) -> None:
        """Counts rows.

        Args:
            columns: Columns of a micro-batch by name, `[n, ...]` each.
            attributes: Names of the attributes of users and of items, in the order of their columns.
        """
        kinds = columns["kind"]
        here = happened(kinds)
        every = bool(here.all())

        def of(name: str) -> NDArray[np.uint64]:
            column: NDArray[np.uint64] = columns[name] if every else columns[name][here]
            return column

        self.rows += int(here.sum())
        for name in (CATEGORY, ITEM, USER):
            self._ids(name).add(of(name))
        self._ids(ACTION).add(of(ACTION).astype(np.uint64) + np.uint64(1))
        self._add_fields("context", self.context, of("context"))
        for side, names in zip(ATTRIBUTES, attributes, strict=True):
            self._add_fields(side, names, _known(side, names, of(side)))
        self.features.add(columns[FEATURES] if every else columns[FEATURES][here])
        learned = trained(kinds)
        self.label.add_reals(columns["label"][learned].astype(np.float64))
        after_s = np.clip(columns["delay_ms"][learned] // 1000, 0, LONGEST_DELAY_S)
        self.delay.add(after_s.astype(np.uint16).reshape(-1, 1))

    def merge(self, other: Statistics) -> None:
        """Adds the counts of `other`, which does not change."""
        self.rows += other.rows
        for name, counted in other.categorical.items():
            self._ids(name).merge(counted)
        for mine, theirs in ((self.label, other.label), (self.delay, other.delay), (self.features, other.features)):
            mine.merge(theirs)

    def _add_fields(self, column: str, names: Sequence[str], ids: NDArray[np.uint64]) -> None:
        for name, one in zip(names, _columns(ids), strict=False):
            self._ids(f"{column}.{name}").add(one)

    def _ids(self, name: str) -> Categorical:
        if name not in self.categorical:
            self.categorical[name] = Categorical(listed=name != USER)
        return self.categorical[name]


def _known(side: str, names: Sequence[str], ids: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Attributes `[n, A]` uint64 with 0 where the user or item is unknown, or its record has no such value."""
    table = AttributeTable(side.partition("_")[0], ())
    absent = [[table.unknown_id(name), table.none_id(name)] for name in names]
    if not absent:
        return ids
    known: NDArray[np.uint64] = np.where((ids[:, :, None] == np.array(absent, np.uint64)).any(axis=2), 0, ids)
    return known.astype(np.uint64, copy=False)


def _columns(ids: NDArray[np.uint64]) -> Iterable[NDArray[np.uint64]]:
    """The columns of `[n, K]` uint64, one after another."""
    return np.ascontiguousarray(ids.T)
