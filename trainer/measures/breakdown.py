"""Slices: metrics of subsets of rows, by action, by new and known users, and by attribute values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from state.compiled import compiled
from state.config.settings import Settings
from trainer.measures import intervals
from trainer.measures.evaluation import SOME, area_under_curve, bins_of, fade
from trainer.measures.intervals import Interval
from trainer.measures.slices import FIRST, Slices
from trainer.measures.step_scores import SUMS, USERS, Judged

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

BINS = 256
DECILES = 10
"""Bins of equal width over the probability, in which the predicted and the observed share are compared."""

LEAST = 100.0
"""The least (weighted) number of rows or pairs with which a slice counts in a gap."""

LOSSES = ("log loss", "log loss of the engagement")
"""The losses that are reported of each step by slice: of rows with a category, and of pairs."""

_LOG_LOSS, _SQUARES, _TOP1 = (SUMS.index(name) for name in ("log_loss", "log_loss_squares", "top1"))


class SliceMeasures(NamedTuple):
    """The metrics of one slice.

    Attributes:
        dimension: `action`, `users` or the name of an attribute.
        value: Its value of the dimension.
        figures: By name: total.rows (since the beginning) and rows. With enough data also log_loss, top1,
            engagement_log_loss, auc, calibration (predicted over observed clicks) and calibration_error (the expected
            difference of both, over DECILES).
        intervals: Their 95 % confidence intervals, of log_loss, top1, auc and calibration.
    """

    dimension: str
    value: str
    figures: dict[str, float]
    intervals: dict[str, Interval]


class _Sums(NamedTuple):
    """The sums by dimension and slice, all float64.

    Attributes:
        rows: `[D, P, 5]`: all rows, those with a category, their log loss, its squares, and those whose category led.
        pairs: `[D, P, DECILES, 4]`: scored pairs by probability, clicked ones, summed probability, and log loss.
        bins: `[D, P, 2, BINS]`: pairs that were not clicked, and those that were, by logit.
        squares: `[D, P, 2]`: squared weights of rows with a category and of pairs, for the effective sample size.
    """

    rows: F64
    pairs: F64
    bins: F64
    squares: F64

    @classmethod
    def none(cls, dimensions: int, values: int) -> _Sums:
        shape = (dimensions, values)
        return cls(*(np.zeros((*shape, *more)) for more in ((5,), (DECILES, 4), (2, BINS), (2,))))


class Breakdown:
    """The running metrics of slices.

    Args:
        values: How many slices each dimension has; a larger index counts as the last one.
        by_item: Whether a negative's slice is that of the row whose item it is.
    """

    def __init__(self, dimensions: Sequence[str], values: Sequence[int], by_item: Sequence[bool]) -> None:
        self.dimensions = tuple(dimensions)
        self._last, self._by_item = np.array(values, np.int64) - 1, np.array(by_item, np.bool_)
        self._sums = _Sums.none(len(self.dimensions), max(values))
        self._total: F64 = np.zeros((len(self.dimensions), max(values)))

    @classmethod
    def of(cls, settings: Settings, slices: Slices) -> Breakdown:
        """The breakdown of a trainer with these settings: by action, by users, and by attributes."""
        slice_counts = [FIRST + settings.attributes.slice_values] * len(slices.names)
        sizes = len(settings.events.actions) + 1, len(USERS) - 1
        return cls(("action", "users", *slices.names), (*sizes, *slice_counts), (False, False, *slices.by_item))

    def update(self, values: Sequence[npt.NDArray[Any]], partner: I64, judged: Judged) -> F64:
        """Adds the rows of one step, and returns their losses by slice; `values` are, by dimension, the slices of the rows.

        Returns:
            `[loss, dimension, place, 3]` float64 of this step, by LOSSES: rows or pairs, their loss, and its squares.
        """
        for sums, power in zip(self._sums, (1, 1, 1, 2), strict=True):
            fade(sums, judged.rows.shape[0], power)
        pairs = judged.pairs
        bins = bins_of(pairs.logits, BINS)
        at = np.minimum(np.stack(values).astype(np.int64), self._last[:, None])
        step = np.zeros((len(LOSSES), *self._total.shape, 3))
        _add(
            at, partner, self._by_item, np.flatnonzero(judged.targets), judged.rows, np.flatnonzero(pairs.scored), bins,
            pairs.predicted, pairs.positive, pairs.losses, *self._sums, self._total, step,
        )  # fmt: skip
        return step

    def measures(self, shown: Mapping[str, Sequence[str]]) -> list[SliceMeasures]:
        """The metrics of each slice that has had a row; `shown` has the names of each dimension's slices."""
        return [
            SliceMeasures(name, shown[name][value], *self._of(number, value))
            for number, name in enumerate(self.dimensions)
            for value in np.flatnonzero(self._total[number]).tolist()
        ]

    def _of(self, number: int, value: int) -> tuple[dict[str, float], dict[str, Interval]]:
        rows, targets, log_loss, squares, top1 = self._sums.rows[number, value].tolist()
        deciles, bins = self._sums.pairs[number, value], self._sums.bins[number, value]
        worth_rows, worth_pairs = self._sums.squares[number, value].tolist()
        pairs, clicked, predicted, losses = deciles.sum(0).tolist()
        figures, sure = {"total.rows": float(self._total[number, value]), "rows": rows}, {}
        if targets >= SOME:
            equal = targets * targets / worth_rows
            figures |= {"log_loss": log_loss / targets, "top1": top1 / targets}
            sure["log_loss"] = intervals.of_mean(log_loss / targets, squares / targets, equal)
            sure["top1"] = intervals.of_share(min(top1 / targets, 1.0), equal)
        if pairs >= SOME:
            off = np.abs(deciles[:, 2] - deciles[:, 1]).sum() / pairs
            figures |= {"engagement_log_loss": losses / pairs, "calibration_error": float(off)}
            if clicked >= SOME:
                figures["calibration"] = predicted / clicked
                equal = pairs * pairs / worth_pairs
                sure["calibration"] = intervals.of_ratio(predicted / pairs, min(clicked / pairs, 1.0), equal)
            if (area := area_under_curve(*bins)) is not None:
                figures["auc"] = area
                if (around := intervals.of_area(bins[0], bins[1], pairs / worth_pairs)) is not None:
                    sure["auc"] = around
        return figures, sure

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """All sums, to be stored in a version."""
        dimensions = json.dumps(self.dimensions).encode()
        sums_by_name = {f"slices.{name}": sums.copy() for name, sums in self._sums._asdict().items()}
        return sums_by_name | {"slices.about": np.frombuffer(dimensions, np.uint8), "slices.total": self._total.copy()}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restores what `state` returned; sums of other slices are discarded."""
        self._sums, self._total = _Sums.none(*self._total.shape), np.zeros_like(self._total)
        if "slices.about" not in state or state["slices.total"].shape != self._total.shape:
            return
        if tuple(json.loads(state["slices.about"].tobytes())) == self.dimensions:
            self._sums = _Sums(*(np.array(state[f"slices.{name}"]) for name in _Sums._fields))
            self._total = np.array(state["slices.total"])


@compiled(
    "i8[:, ::1], i8[::1], bool[::1], i8[::1], f8[:, ::1], i8[::1], i8[::1], f8[::1], bool[::1], f8[::1], f8[:, :, ::1], f8[:, :, :, ::1], f8[:, :, :, ::1], f8[:, :, ::1], f8[:, ::1], f8[:, :, :, ::1]"
)
def _add(
    values: I64,
    partner: I64,
    by_item: Flags,
    targets: I64,
    judged: F64,
    scored: I64,
    bin_of: I64,
    predicted: F64,
    positive: Flags,
    losses: F64,
    rows: F64,
    pairs: F64,
    bins: F64,
    squares: F64,
    total: F64,
    step: F64,
) -> None:
    count = values.shape[1]
    for d in range(values.shape[0]):
        for i in range(count):
            rows[d, values[d, i], 0] += 1.0
            total[d, values[d, i]] += 1.0
        for i in range(targets.shape[0]):
            at = values[d, targets[i]]
            rows[d, at, 1] += 1.0
            rows[d, at, 2] += judged[i, _LOG_LOSS]
            rows[d, at, 3] += judged[i, _SQUARES]
            rows[d, at, 4] += judged[i, _TOP1]
            squares[d, at, 0] += 1.0
            step[0, d, at, 0] += 1.0
            step[0, d, at, 1] += judged[i, _LOG_LOSS]
            step[0, d, at, 2] += judged[i, _SQUARES]
        for i in range(scored.shape[0]):
            row = scored[i]
            if row >= count:
                row = partner[row - count] if by_item[d] else row - count
            at, clicked = values[d, row], 1 if positive[i] else 0
            decile = min(int(predicted[i] * DECILES), DECILES - 1)
            pairs[d, at, decile, 0] += 1.0
            pairs[d, at, decile, 1] += clicked
            pairs[d, at, decile, 2] += predicted[i]
            pairs[d, at, decile, 3] += losses[i]
            bins[d, at, clicked, bin_of[i]] += 1.0
            squares[d, at, 1] += 1.0
            step[1, d, at, 0] += 1.0
            step[1, d, at, 1] += losses[i]
            step[1, d, at, 2] += losses[i] * losses[i]


def shown_of(actions: Sequence[str], slices: Slices) -> dict[str, Sequence[str]]:
    """The names of each dimension's slices; the last one of `action` is for actions that the settings do not name."""
    return {"action": (*actions, "(other)"), "users": USERS[1:], **slices.shown()}


def values(measures: Sequence[SliceMeasures]) -> Iterator[tuple[str, float]]:
    """Each figure as `slice.<dimension>.<value>.<metric>`, its interval as `.low` and `.high`, and the gaps."""
    for slice_ in measures:
        where = f"slice.{slice_.dimension}.{slice_.value}"
        yield from ((f"{where}.{name}", figure) for name, figure in slice_.figures.items())
        for name, (low, high) in slice_.intervals.items():
            yield f"{where}.{name}.low", low
            yield f"{where}.{name}.high", high
    for dimension in dict.fromkeys(slice_.dimension for slice_ in measures):
        for name in GAPS:
            slice_gap = gap(measures, dimension, name)
            if slice_gap is not None:
                yield f"gap.{dimension}.{name}", slice_gap.size
                yield f"gap.{dimension}.{name}.sure", slice_gap.sure


class SliceGap(NamedTuple):
    """The difference between the worst and the best slice of a dimension.

    Attributes:
        sure: The distance between their confidence intervals; 0 if they overlap.
    """

    size: float
    sure: float
    best: str
    worst: str


GAPS = {"log_loss": -1, "auc": 1}
"""Metrics that slices are compared by: 1 if higher is better, -1 if lower is better."""


def gap(measures: Sequence[SliceMeasures], dimension: str, name: str) -> SliceGap | None:
    """The gap of a dimension in one of GAPS, over slices with at least LEAST rows; None if there are fewer than two.

    Some of many slices differ by chance alone, so the intervals of the best and the worst of k are widened to 1 - 0.05 / k
    (Bonferroni).

    >>> one = SliceMeasures("age", "old", {"rows": 900.0, "log_loss": 3.0}, {"log_loss": (2.9, 3.1)})
    >>> other = SliceMeasures("age", "young", {"rows": 900.0, "log_loss": 2.0}, {"log_loss": (1.9, 2.1)})
    >>> found = gap([one, other], "age", "log_loss")
    >>> found.size, round(found.sure, 3), found.best, found.worst
    (1.0, 0.771, 'young', 'old')
    """
    large = [
        slice_
        for slice_ in measures
        if slice_.dimension == dimension and name in slice_.intervals and slice_.figures["rows"] >= LEAST
    ]
    if len(large) < 2:
        return None
    ordered = sorted(large, key=lambda slice_: slice_.figures[name] * GAPS[name])
    worst, best = ordered[0], ordered[-1]
    wider = intervals.widened(len(large))
    size = abs(worst.figures[name] - best.figures[name])
    inner = sum((slice_.intervals[name][1] - slice_.intervals[name][0]) / 2 * wider for slice_ in (worst, best))
    return SliceGap(size, max(size - inner, 0.0), best.value, worst.value)
