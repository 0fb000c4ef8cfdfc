"""Slices: metrics of subsets of rows, by action, by new and known users, and by attribute values.

An attribute has one slice for unknown values and one for no value. Each of the first other values gets its own slice, in
the order of occurrence. All further values share one slice. So the slices are bounded, and a function of the log.

`Slices` assigns the values of attributes to slices. Its sums are part of a version's digest since 0.1.0. The metrics of
versions are those of `Breakdown`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from state.attributes.values import U64
from state.compiled import compiled, layout
from state.config.sections import Attributes
from state.config.settings import Settings
from trainer.measures import evaluation
from trainer.measures.evaluation import SOME, Interval, area_under_curve, bins_of, fade
from trainer.measures.progressive import SUMS, USERS, Judged
from trainer.model.attributes import Columns

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

UNKNOWN, NONE, OTHER, FIRST = 0, 1, 2, 3
SHOWN = ("(unknown)", "(none)", "(other)")
DIGESTED_BINS = 64
DIGESTED_SUMS = ("rows", "targets", "log_loss", "top1", "pairs", "engagement_log_loss")
"""The sums of `Slices`."""

BINS = 256
DECILES = 10
"""Bins of equal width over the probability, in which the predicted and the observed share are compared."""

LEAST = 100.0
"""The least (weighted) number of rows or pairs with which a slice counts in a gap."""

LOSSES = ("log loss", "log loss of the engagement")
"""The losses that are reported of each step by slice: of rows with a category, and of pairs."""

_LOG_LOSS, _SQUARES, _TOP1 = (SUMS.index(name) for name in ("log_loss", "log_loss_squares", "top1"))


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
        self._sums: F64 = np.zeros((count, size, len(DIGESTED_SUMS)))
        self._bins: F64 = np.zeros((count, size, 2, DIGESTED_BINS))

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
        cells = (paired * 2 + scored.positive) * DIGESTED_BINS + bins_of(scored.logits, DIGESTED_BINS)
        self._bins[number] += np.bincount(cells, minlength=count * 2 * DIGESTED_BINS).reshape(count, 2, DIGESTED_BINS)

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


@layout("f8[:, :, ::1], f8[:, :, :, ::1], f8[:, :, :, ::1], f8[:, :, ::1]")
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


@layout("i8[::1], f8[:, ::1], i8[::1], i8[::1], f8[::1], bool[::1], f8[::1]")
class _JudgedRows(NamedTuple):
    """The rows and pairs of a step that have a target or a score.

    Attributes:
        targets: `[t]` int64, the rows with a category.
        sums: `[t, sum]` float64, see `Judged.rows`.
        scored: `[m]` int64, the scored pairs, of n rows and then of their negatives.
        bins: `[m]` int64, their bins by logit; the other fields as in `ScoredPairs`.
    """

    targets: I64
    sums: F64
    scored: I64
    bins: I64
    predicted: F64
    positive: Flags
    losses: F64


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
        targets, scored = np.flatnonzero(judged.targets), np.flatnonzero(pairs.scored)
        rows = _JudgedRows(targets, judged.rows, scored, bins, pairs.predicted, pairs.positive, pairs.losses)
        _add(at, partner, self._by_item, rows, self._sums, self._total, step)
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
            sure["log_loss"] = evaluation.interval_of_mean(log_loss / targets, squares / targets, equal)
            sure["top1"] = evaluation.interval_of_share(min(top1 / targets, 1.0), equal)
        if pairs >= SOME:
            off = np.abs(deciles[:, 2] - deciles[:, 1]).sum() / pairs
            figures |= {"engagement_log_loss": losses / pairs, "calibration_error": float(off)}
            if clicked >= SOME:
                figures["calibration"] = predicted / clicked
                equal = pairs * pairs / worth_pairs
                sure["calibration"] = evaluation.interval_of_ratio(predicted / pairs, min(clicked / pairs, 1.0), equal)
            if (area := area_under_curve(*bins)) is not None:
                figures["auc"] = area
                if (around := evaluation.interval_of_area(bins[0], bins[1], pairs / worth_pairs)) is not None:
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


@compiled("i8[:, ::1], i8[::1], bool[::1], _JudgedRows, _Sums, f8[:, ::1], f8[:, :, :, ::1]")
def _add(values: I64, partner: I64, by_item: Flags, judged: _JudgedRows, sums: _Sums, total: F64, step: F64) -> None:
    targets, judged_sums, scored, bin_of, predicted, positive, losses = judged
    rows, pairs, bins, squares = sums
    count = values.shape[1]
    for d in range(values.shape[0]):
        for i in range(count):
            rows[d, values[d, i], 0] += 1.0
            total[d, values[d, i]] += 1.0
        for i in range(targets.shape[0]):
            at = values[d, targets[i]]
            rows[d, at, 1] += 1.0
            rows[d, at, 2] += judged_sums[i, _LOG_LOSS]
            rows[d, at, 3] += judged_sums[i, _SQUARES]
            rows[d, at, 4] += judged_sums[i, _TOP1]
            squares[d, at, 0] += 1.0
            step[0, d, at, 0] += 1.0
            step[0, d, at, 1] += judged_sums[i, _LOG_LOSS]
            step[0, d, at, 2] += judged_sums[i, _SQUARES]
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
    wider = evaluation.widened(len(large))
    size = abs(worst.figures[name] - best.figures[name])
    inner = sum((slice_.intervals[name][1] - slice_.intervals[name][0]) / 2 * wider for slice_ in (worst, best))
    return SliceGap(size, max(size - inner, 0.0), best.value, worst.value)
