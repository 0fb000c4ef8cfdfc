"""Learns the probability that a user leaves (churn), from the rows of the trainer's steps.

A row shows that its user was active, even if the guard skips its step. A row with a delayed label represents its
impression. If an outcome made the label, the row represents the outcome.

Rows wait until it is known whether their users left (`ChurnWaiting`). Which rows wait is a function of the log:

1. Each row of a user ends the preceding one: its time is when the next event came.
2. A row has moments (`state/churn.py`), the first at a hash of user and time. A moment at or after the next
   event does not belong to the row. A row without moments is dropped at once, as are most rows of a session.
3. A moment's label is known when log time has passed its span plus the time for late events. It is 1 if no event came
   in the span, else 0. Both labels of a day become known on the same day, so early leavers do not bias the shares.
4. The number of rows is bounded. If more arrive, every other user is dropped, by a hash of the user. If few are left,
   more users are sampled again. So the sampled users are representative of all users.

A row that is older than its user's newest one is ignored.

Two regressions are learned in sequence: one from inputs to a logit, then one with two weights from logits to
calibrated probabilities (Platt 1999). The second uses logits from before their examples were learned.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from state.churn import CODE, STEEPEST_LOGIT, ChurnInputs, ChurnWeights, Horizon, calibrated, tensors_of
from state.compiled import compiled_sums
from state.config.settings import Settings
from state.features.spec import FeatureSpec
from state.microbatch.batch import Kind, MicroBatch
from trainer.measures.evaluation import BINS, SOME, area_under_curve, bins_of, fade
from trainer.tables.index import U64, IdIndex, hashed_uniform

HALVINGS = 40


class OnlineRegression:
    """A logistic regression that learns online.

    Args:
        mean: `[I]` float64, the weights before the first example.
        variance: The initial variance of each weight.
        drift: The amount by which each variance grows with each example.
    """

    def __init__(self, mean: F64, variance: float, drift: float) -> None:
        self._first, self._variance, self._drift = mean.copy(), variance, drift
        self.clear()

    def clear(self) -> None:
        """Resets to the initial state."""
        self.mean: F64 = self._first.copy()
        # The matrix is symmetric: only the diagonal and the part above it are used.
        self._covariance: F64 = np.eye(self.mean.size) * self._variance

    def learn(self, inputs: F64, outcome: npt.NDArray[np.bool_]) -> F64:
        """Learns `[n, I]` float64 inputs and their `[n]` bool outcomes one after another.

        Returns `[n]` float64, the logit of each example before it was learned.
        """
        logits = np.empty(len(outcome))
        inputs, outcomes = np.ascontiguousarray(inputs), outcome.astype(np.float64)
        _learn(inputs, outcomes, self.mean, self._covariance, self._variance, self._drift, logits)
        return logits

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The whole state, to be stored in a version."""
        return {"mean": self.mean.copy(), "covariance": self._covariance[np.triu_indices(self.mean.size)]}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restores what `state` returned."""
        self.mean = np.array(state["mean"])
        self._covariance = np.zeros((self.mean.size, self.mean.size))
        self._covariance[np.triu_indices(self.mean.size)] = state["covariance"]


@compiled_sums("f8[:, ::1], f8[::1], f8[::1], f8[:, ::1], f8, f8, f8[::1]")
def _learn(inputs: F64, outcomes: F64, mean: F64, covariance: F64, variance: float, drift: float, logits: F64) -> None:
    size = mean.shape[0]
    along = np.empty(size)
    for n in range(inputs.shape[0]):
        example = inputs[n]
        logit = 0.0
        for j in range(size):
            logit += mean[j] * example[j]
        logits[n] = logit
        along[:] = 0.0
        for i in range(size):
            value = example[i]
            total = covariance[i, i] * value
            for j in range(i + 1, size):
                total += covariance[i, j] * example[j]
                along[j] += covariance[i, j] * value
            along[i] += total
        spread = 0.0
        for j in range(size):
            spread += along[j] * example[j]
        low = high = logit
        reach = spread * (outcomes[n] - 1.0 / (1.0 + math.exp(-logit)))
        low, high = min(logit, logit + reach), max(logit, logit + reach)
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            if middle - logit > spread * (outcomes[n] - 1.0 / (1.0 + math.exp(-middle))):
                high = middle
            else:
                low = middle
        share = 1.0 / (1.0 + math.exp(-0.5 * (low + high)))
        step, curve = outcomes[n] - share, share * (1.0 - share)
        curve /= 1.0 + curve * spread
        for i in range(size):
            mean[i] += along[i] * step
            scaled = curve * along[i]
            for j in range(i, size):
                covariance[i, j] -= scaled * along[j]
            if covariance[i, i] < variance:
                covariance[i, i] += drift


I64 = npt.NDArray[np.int64]
U16 = npt.NDArray[np.uint16]
U8 = npt.NDArray[np.uint8]
F64 = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

ROW_COLUMNS = ("user", "at_ms", "next_ms", "moment_ms", "windows", "action")
"""The columns of each waiting row that a version holds."""

NEVER_MS = np.iinfo(np.int64).max
_FIRST_CAPACITY = 1024
_FEW = 4
"""Below a fourth of the capacity more users are sampled."""

SUMS = ("rows", "log_loss", "predicted", "left")
TENTHS = 10
_LEAST = 1e-12

DAY_S = 86_400
MOST_EXAMPLES = 20_000  # rows that wait for their label; each takes 200 bytes of a durable version
FEW = 50
"""Users that must have left, and that must have stayed, before probabilities are served."""

_VARIANCE, _DRIFT = 1.0, 1e-8
_CALIBRATION_VARIANCE, _CALIBRATION_DRIFT = 0.05, 1e-7

logger = logging.getLogger(__name__)


class KnownExamples(NamedTuple):
    """Examples whose label became known, in the order in which it did.

    Attributes:
        windows: `[m, C]` uint16, before each user's latest event.
        action: `[m]` uint8, of that event.
        age_ms: `[m]` int64, its age at the moment.
        left: `[m]` bool, whether no event came in the span after the moment.
        user: `[m]` uint64.
        moment_ms: `[m]` int64, log time.
    """

    windows: U16
    action: U8
    age_ms: I64
    left: Flags
    user: U64
    moment_ms: I64

    def take(self, rows: I64 | Flags) -> KnownExamples:
        """Selects some of the examples."""
        return KnownExamples(
            self.windows[rows],
            self.action[rows],
            self.age_ms[rows],
            self.left[rows],
            self.user[rows],
            self.moment_ms[rows],
        )


class ChurnWaiting:
    """Rows that wait until it is known whether their users left.

    Args:
        late_ms: The maximum time by which a row may arrive late.
        columns: `[C]` int64, which features are kept of a row.
    """

    def __init__(self, horizon: Horizon, late_ms: int, most: int, columns: I64) -> None:
        self._horizon, self._late_ms, self._most, self._columns = horizon, late_ms, most, columns
        self.clear()

    def __len__(self) -> int:
        return self._size

    def clear(self) -> None:
        """Drops all waiting rows."""
        self.dropped, self._halvings, self._size = 0, 0, 0
        # Slot 0 is unused: the index returns 0 for unknown users.
        self._free: list[int] = []
        self._user: U64 = np.zeros(0, np.uint64)
        self._at_ms, self._next_ms, self._moment_ms, self._due_ms = (np.zeros(0, np.int64) for _ in range(4))
        self._windows: U16 = np.zeros((0, self._columns.size), np.uint16)
        self._action: U8 = np.zeros(0, np.uint8)
        self._newest = IdIndex()
        self._reserve(_FIRST_CAPACITY)

    def observe(self, user: U64, at_ms: I64, features: U16, action: U8) -> None:
        """Takes `[n]` rows in the order of the log, with `[n, D]` features before each; user 0 is no user."""
        slots = self._newest.find(user)
        newer = self._looked_at(user) & ((slots == 0) | (at_ms >= self._at_ms[slots]))
        order = np.flatnonzero(newer)
        order = order[np.lexsort((at_ms[order], user[order]))]
        if not order.size:
            return
        user, at_ms = user[order], at_ms[order]
        last = np.append(user[1:] != user[:-1], True)
        first = np.insert(last[:-1], 0, True)
        # 1. 2. Earlier rows.
        self._end(slots[order[first]], at_ms[first])
        # New rows. Those with a moment of their own wait.
        following_ms = np.where(last, NEVER_MS, np.append(at_ms[1:], NEVER_MS))
        moment_ms = self._first_moment(user, at_ms)
        waits = moment_ms < following_ms
        rows = order[waits]
        windows = features[np.ix_(rows, self._columns)]
        self._put(user[waits], at_ms[waits], following_ms[waits], moment_ms[waits], windows, action[rows])
        # 4.
        while self._size > self._most:
            self._halvings += 1
            used = self._used()
            self.dropped += self._remove(used[~self._looked_at(self._user[used])])
        if self._halvings and self._size * _FEW < self._most:
            self._halvings -= 1

    def known(self, log_ms: int) -> KnownExamples:
        """3. The examples whose label is known at a log time; each once."""
        horizon = self._horizon
        slots = np.flatnonzero(self._due_ms < log_ms)
        moment_ms, at_ms, next_ms = self._moment_ms[slots], self._at_ms[slots], self._next_ms[slots]
        last_ms = self._last_moment(slots)
        until_ms = np.minimum(last_ms, log_ms - horizon.span_ms - self._late_ms - 1)
        counts = (until_ms - moment_ms) // horizon.stride_ms + 1
        rows = np.repeat(np.arange(slots.size), counts)
        nth = np.arange(rows.size) - np.repeat(np.cumsum(counts) - counts, counts)
        moments_ms = moment_ms[rows] + nth * horizon.stride_ms
        examples = KnownExamples(
            self._windows[slots[rows]],
            self._action[slots[rows]],
            moments_ms - at_ms[rows],
            next_ms[rows] > moments_ms + horizon.span_ms,
            self._user[slots[rows]],
            moments_ms,
        )
        self._moment_ms[slots] = moment_ms + counts * horizon.stride_ms
        self._due_ms[slots] = self._moment_ms[slots] + horizon.span_ms + self._late_ms
        self._remove(slots[self._moment_ms[slots] > last_ms])
        # The slot of a row must not affect the order.
        order = np.lexsort((examples.user, examples.moment_ms))
        return examples.take(order)

    def forget(self, users: U64) -> int:
        """Removes all rows of users (`[n]` uint64); returns how many."""
        slots = self._used()
        return self._remove(slots[np.isin(self._user[slots], users)])

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """All rows by user and time, and the share of sampled users, for a version."""
        slots = self._used()
        slots = slots[np.lexsort((self._at_ms[slots], self._user[slots]))]
        columns = {name: getattr(self, f"_{name}")[slots] for name in ROW_COLUMNS}
        return {**columns, "counts": np.array([self._halvings, self.dropped], np.int64)}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Replaces everything by what `state` returned."""
        self.clear()
        self._halvings, self.dropped = (int(count) for count in state["counts"])
        self._put(*(np.array(state[name]) for name in ROW_COLUMNS))

    def _looked_at(self, user: U64) -> Flags:
        if not self._halvings:
            return np.asarray(user != 0)
        share = np.float32(2.0 ** (1 - self._halvings) - 1.0)
        return np.asarray((hashed_uniform(user, 1, "churn.users")[:, 0] < share) & (user != 0))

    def _first_moment(self, user: U64, at_ms: I64) -> I64:
        """Draws the first moment of each row, within a stride after it, `[n]` int64."""
        drawn = hashed_uniform(user ^ at_ms.astype(np.uint64), 1, "churn.moments")[:, 0].astype(np.float64)
        return np.asarray(at_ms + ((drawn + 1.0) * (self._horizon.stride_ms / 2)).astype(np.int64))

    def _last_moment(self, slots: I64) -> I64:
        return np.minimum(self._next_ms[slots], self._at_ms[slots] + self._horizon.reach_ms) - 1

    def _end(self, slots: npt.NDArray[np.int32], next_ms: I64) -> None:
        """Takes the next events of users whose newest rows are at `slots`; 0 for none."""
        has_slot = slots != 0
        known_slots, next_ms = slots[has_slot].astype(np.int64), next_ms[has_slot]
        self._next_ms[known_slots] = next_ms
        self._newest.remove(self._user[known_slots])
        self._remove(known_slots[self._moment_ms[known_slots] >= next_ms])

    def _put(self, user: U64, at_ms: I64, next_ms: I64, moment_ms: I64, windows: U16, action: U8) -> None:
        if len(self._free) < user.size:
            self._reserve(max(2 * self._user.size, self._size + user.size + 1))
        slots = np.array([self._free.pop() for _ in range(user.size)], np.int64)
        self._user[slots], self._at_ms[slots], self._next_ms[slots] = user, at_ms, next_ms
        self._moment_ms[slots], self._windows[slots], self._action[slots] = moment_ms, windows, action
        self._due_ms[slots] = moment_ms + self._horizon.span_ms + self._late_ms
        self._size += user.size
        newest = next_ms == NEVER_MS
        self._newest.insert(user[newest], slots[newest].astype(np.int32))

    def _remove(self, slots: I64) -> int:
        newest = slots[self._next_ms[slots] == NEVER_MS]
        self._newest.remove(self._user[newest])
        self._user[slots], self._due_ms[slots] = 0, NEVER_MS
        self._free += slots.tolist()
        self._size -= slots.size
        return int(slots.size)

    def _used(self) -> I64:
        return np.flatnonzero(self._user)

    def _reserve(self, capacity: int) -> None:
        used = self._user.size
        for name in ("_user", "_at_ms", "_next_ms", "_moment_ms", "_due_ms", "_windows", "_action"):
            column = getattr(self, name)
            grown = np.zeros((capacity, *column.shape[1:]), column.dtype)
            grown[:used] = column
            setattr(self, name, grown)
        self._due_ms[used:] = NEVER_MS
        self._free += range(capacity - 1, max(used, 1) - 1, -1)


class ChurnMeasures:
    """The running measures of examples before they are learned, since the beginning and with the half-life of `Evaluation`."""

    def __init__(self) -> None:
        # [total and recent, sum]; [total and recent, stayed and left, bin]; [tenth, rows and predicted and left].
        self._sums: F64 = np.zeros((2, len(SUMS)))
        self._bins: F64 = np.zeros((2, 2, BINS))
        self._tenths: F64 = np.zeros((TENTHS, 3))

    def update(self, probability: F64, has_left: npt.NDArray[np.bool_]) -> None:
        """Adds `[n]` examples, with their probabilities before they were learned."""
        for sums in (self._sums[1], self._bins[1], self._tenths):
            fade(sums, has_left.size)
        likely = np.clip(probability, _LEAST, 1.0 - _LEAST)
        losses = -np.log(np.where(has_left, likely, 1.0 - likely))
        self._sums += (has_left.size, losses.sum(), probability.sum(), has_left.sum())
        logits = np.log(likely) - np.log1p(-likely)
        placed = bins_of(logits, BINS)
        for outcome in (0, 1):
            self._bins[:, outcome] += np.bincount(placed[has_left == bool(outcome)], minlength=BINS)
        tenth = np.minimum((probability * TENTHS).astype(np.int64), TENTHS - 1)
        for column, weights in enumerate((np.ones(has_left.size), probability, has_left)):
            self._tenths[:, column] += np.bincount(tenth, weights, TENTHS)

    @property
    def seen(self) -> tuple[int, int]:
        """The numbers of users who stayed and who left, since the beginning."""
        return int(self._sums[0, 0] - self._sums[0, 3]), int(self._sums[0, 3])

    def values(self) -> dict[str, float]:
        """Returns the measures by name: recent ones under `churn.`, those since the beginning under `churn.total.`.

        The names are rows, log_loss, left (the share that left), auc, and calibration (predicted over observed). Recent
        measures also have calibration_error, the mean distance of predicted and observed over tenths of the
        probability. A measure without rows is absent.
        """
        measures: dict[str, float] = {}
        for when, prefix in ((1, "churn."), (0, "churn.total.")):
            rows, log_loss, predicted, left_sum = self._sums[when].tolist()
            measures[f"{prefix}rows"] = rows
            if rows >= SOME:
                measures |= {f"{prefix}log_loss": log_loss / rows, f"{prefix}left": left_sum / rows}
            if left_sum >= SOME:
                measures[f"{prefix}calibration"] = predicted / left_sum
            area = area_under_curve(self._bins[when, 0], self._bins[when, 1])
            if area is not None:
                measures[f"{prefix}auc"] = area
        if (rows := float(self._tenths[:, 0].sum())) >= SOME:
            measures["churn.calibration_error"] = float(np.abs(self._tenths[:, 1] - self._tenths[:, 2]).sum()) / rows
        return measures

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """All sums, for a version."""
        return {"sums": self._sums.copy(), "bins": self._bins.copy(), "tenths": self._tenths.copy()}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Sets what `state` returned."""
        self._sums, self._bins, self._tenths = (np.array(state[name]) for name in ("sums", "bins", "tenths"))


class ChurnLearner:
    """The churn model of a trainer, with its waiting rows and measures. One thread.

    Args:
        span_ms: The span without an event after which a user counts as having left.
        late_ms: The maximum time by which a row may arrive late.
    """

    def __init__(self, spec: FeatureSpec, span_ms: int, late_ms: int, most: int) -> None:
        self._horizon = Horizon.of(span_ms, spec)
        self._inputs = ChurnInputs(spec, self._horizon)
        self._header = np.array([CODE, span_ms, self._inputs.digest, late_ms, most], np.int64)
        self.waiting = ChurnWaiting(self._horizon, late_ms, most, self._inputs.columns)
        self._regression = OnlineRegression(np.zeros(self._inputs.width), _VARIANCE, _DRIFT)
        self._calibration = OnlineRegression(np.array([1.0, 0.0]), _CALIBRATION_VARIANCE, _CALIBRATION_DRIFT)
        self.measures = ChurnMeasures()

    @classmethod
    def of(cls, settings: Settings, spec: FeatureSpec) -> ChurnLearner | None:
        """The learner of the settings; None if `churn.days` is 0."""
        wanted, labels = settings.churn, settings.labels
        if not wanted.days:
            return None
        late_s = labels.wait_s if labels.impressions else 0.0
        return cls(spec, max(1, round(wanted.days * DAY_S * 1000)), round(late_s * 1000), MOST_EXAMPLES)

    def clear(self) -> None:
        """Forgets everything learned, and drops the waiting rows."""
        self.waiting.clear()
        self._regression.clear()
        self._calibration.clear()
        self.measures = ChurnMeasures()

    def take(self, batch: MicroBatch, log_ms: int) -> None:
        """Takes the rows of a step, in log time, and learns from the examples whose label is known at `log_ms`."""
        self.observe(batch)
        examples = self.waiting.known(log_ms)
        if examples.left.size:
            self.learn(examples)

    def observe(self, batch: MicroBatch) -> None:
        """Takes rows, in log time, that show that their users were active."""
        # Probe clicks that measure the loop's latency belong to no user.
        user = np.where((batch.item != 0) | (batch.category != 0), batch.user, np.uint64(0))
        after_ms = np.where(batch.kind == Kind.JOINED, np.maximum(batch.delay_ms, 0), 0)
        self.waiting.observe(user, batch.at_ms + after_ms, batch.features, batch.action)

    def learn(self, examples: KnownExamples) -> F64:
        """Scores examples and learns them, one after another; returns their calibrated probabilities before that, `[m]` float64."""
        logits = self._regression.learn(
            self._inputs.of(examples.windows, examples.action, examples.age_ms), examples.left
        )
        logits = np.clip(logits, -STEEPEST_LOGIT, STEEPEST_LOGIT)
        predicted = calibrated(
            self._calibration.learn(np.stack([logits, np.ones(logits.size)], 1), examples.left), 1.0, 0.0
        )
        self.measures.update(predicted, examples.left)
        return predicted

    def weights(self) -> ChurnWeights | None:
        """The weights for serving; None before enough was learned."""
        if min(self.measures.seen) < FEW:
            return None
        slope, intercept = self._calibration.mean.tolist()
        return ChurnWeights(self._horizon, self._inputs, slope, intercept, self._regression.mean)

    def served(self) -> dict[str, npt.NDArray[Any]]:
        """The tensors for serving, none before enough was learned."""
        weights = self.weights()
        return {} if weights is None else tensors_of(weights)

    def values(self) -> dict[str, float]:
        """The measures by name, for a version."""
        counts = {"churn.waiting": float(len(self.waiting)), "churn.dropped": float(self.waiting.dropped)}
        return self.measures.values() | counts

    def forget(self, users: U64) -> int:
        """Removes the waiting rows of users (`[n]` uint64); returns how many. The learned weights stay."""
        return self.waiting.forget(users)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """All of it by name, for a version."""
        parts = {
            "waiting": self.waiting.state(),
            "regression": self._regression.state(),
            "calibration": self._calibration.state(),
            "measures": self.measures.state(),
        }
        state_by_name = {f"{part}.{name}": value for part, state in parts.items() for name, value in state.items()}
        return {"about": self._header.copy(), **state_by_name}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Loads the result of `state`; starts from scratch if a version has none, or another span, spec or code."""
        self.clear()
        if not state:
            return
        if not np.array_equal(state["about"], self._header):
            logger.info("churn starts from scratch: the version has another span, feature spec or release")
            return

        def part(name: str) -> dict[str, npt.NDArray[Any]]:
            return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}

        self.waiting.load(part("waiting"))
        self._regression.load(part("regression"))
        self._calibration.load(part("calibration"))
        self.measures.load(part("measures"))
