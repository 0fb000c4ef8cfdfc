"""Churn: as many users leave as predicted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest

from evaluation.measures import area_under_curve
from state.churn import PREFIX, STORED, weights_in
from state.features.spec import EVENT, FeatureSpec
from state.microbatch.batch import MicroBatch
from tests.bench.recorded import SOURCE, Recorded, micro_batches, plain
from trainer.churn import FEW, TENTHS, ChurnLearner, KnownExamples, OnlineRegression

SPEC = FeatureSpec()
WARM_UP_DAYS = 12
F64 = npt.NDArray[np.float64]


def learner() -> ChurnLearner:
    return ChurnLearner(SPEC, 7 * DAY_MS, 0, 100_000)


@cache
def shoppers() -> tuple[Leavers, list[MicroBatch]]:
    made = leavers(400, 42)
    return made, list(batches(made.clicks, SPEC))


@cache
def progressive() -> tuple[KnownExamples, F64]:
    """What became known once something was learned, and what had been said of it."""
    known, told = joined(taken(learner(), iter(shoppers()[1])))
    begun = known.moment_ms > known.moment_ms.min() + WARM_UP_DAYS * DAY_MS
    return known.take(begun), told[begun]


def test_churn_predictions_beat_recency() -> None:
    known, told = progressive()
    assert known.left.size > 2000
    ours, recency = (area_under_curve(scores, known.left).value for scores in (told, known.age_ms.astype(np.float64)))
    assert ours > recency + 0.02
    assert ours > 0.8


def test_as_many_users_leave_as_predicted_in_each_decile() -> None:
    known, told = progressive()
    tenth = np.minimum((told * TENTHS).astype(int), TENTHS - 1)
    seen = 0
    for place in range(TENTHS):
        mine = tenth == place
        if mine.sum() >= 200:
            seen += 1
            assert told[mine].mean() == pytest.approx(known.left[mine].mean(), abs=0.1), f"tenth {place}"
    assert seen >= 4
    off = sum(abs((told - known.left)[tenth == place].sum()) for place in range(TENTHS)) / told.size
    assert off < 0.04


def test_measures_are_those_of_the_examples() -> None:
    ours = learner()
    known, told = joined(taken(ours, iter(shoppers()[1])))
    found = ours.values()
    assert found["churn.total.rows"] == told.size
    assert found["churn.total.log_loss"] == pytest.approx(-np.log(np.where(known.left, told, 1 - told)).mean())
    assert found["churn.total.calibration"] == pytest.approx(told.sum() / known.left.sum())
    assert found["churn.total.auc"] == pytest.approx(area_under_curve(told, known.left).value, abs=0.005)
    assert found["churn.total.left"] == pytest.approx(known.left.mean())
    assert 0 < found["churn.calibration_error"] < 0.1


def test_a_version_predicts_churn_once_enough_was_learned_and_serving_agrees() -> None:
    ours = learner()
    said: list[tuple[int, int]] = []
    for known, _ in taken(ours, iter(shoppers()[1])):
        if not said and min(ours.measures.seen) >= FEW:
            said = [ours.measures.seen]
            assert ours.served()
        elif not said:
            assert ours.served() == {}
        last = known
    assert said
    weights = ours.weights()
    stored = {f"{STORED}{name}": one for name, one in ours.served().items()}
    read = weights_in(stored, SPEC)
    assert weights is not None and read is not None
    inputs = read.inputs.of(last.windows, last.action, last.age_ms)
    assert read.probabilities(inputs).tolist() == weights.probabilities(inputs).tolist()
    assert weights_in(stored, FeatureSpec(windows_s=(3600, 86_400))) is None, "of another feature spec"
    older = {**stored, f"{STORED}{PREFIX}about": stored[f"{STORED}{PREFIX}about"] + np.array([1, 0, 0])}
    assert weights_in(older, SPEC) is None, "of another release"


def test_the_regression_is_as_good_as_one_fitted_to_all_examples() -> None:
    """Its weights are those of the posterior that Newton's method finds over all examples at once."""
    drawn = np.random.default_rng(5)
    inputs = np.concatenate([np.ones((4000, 1)), drawn.normal(0, 1, (4000, 5))], 1)
    true = np.array([-1.0, 2.0, 0.0, -0.5, 1.0, 0.0])
    left = drawn.random(4000) < 1 / (1 + np.exp(-inputs @ true))
    online = OnlineRegression(np.zeros(6), 1.0, 0.0)
    online.learn(inputs, left)
    fitted = np.zeros(6)
    for _ in range(30):
        share = 1 / (1 + np.exp(-inputs @ fitted))
        curve = (inputs * (share * (1 - share))[:, None]).T @ inputs + np.eye(6)
        fitted += np.linalg.solve(curve, inputs.T @ (left - share) - fitted)
    spread = np.sqrt(np.diag(np.linalg.inv(curve)))
    assert np.abs((online.mean - fitted) / spread).max() < 0.75


DAY_MS = 86_400_000
START_MS = 1_790_000_000_000
CATEGORIES, ITEMS = 40, 2000
WEIGHTS = (1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Leavers:
    """Shoppers.

    Attributes:
        clicks: In order of time.
        left_ms: By user, when that user had left.
    """

    clicks: Recorded
    left_ms: dict[int, int]


def leavers(count: int, days: int, seed: int = 3) -> Leavers:
    """Shoppers over some days.

    A third is there at the beginning, others come day after day. Each comes at a pace of its own, rather regularly: 1.5
    days in the median, a third or three times that for many. Who buys stays 60 days in the mean, who only looks 12; three in ten buy.
    """
    drawn = np.random.default_rng(seed)
    users: list[int] = []
    times: list[float] = []
    actions: list[int] = []
    left_ms = {}
    for number in range(1, count + 1):
        came = 0.0 if drawn.random() < 1 / 3 else drawn.random() * days
        pace, buys = float(np.clip(1.5 * np.exp(drawn.normal(0.0, 1.0)), 0.2, 15.0)), drawn.random() < 0.3
        leaves = came + drawn.exponential(60.0 if buys else 12.0)
        left_ms[number] = START_MS + int(leaves * DAY_MS)
        at = came + drawn.random() * pace
        while at < min(leaves, days):
            clicks = 1 + drawn.geometric(0.35)
            for at_click in at + np.cumsum(drawn.exponential(2.0 / 1440, clicks)):
                if at_click < min(leaves, days):
                    users.append(number)
                    times.append(at_click)
                    actions.append(int(drawn.choice(4, p=(0.7, 0.1, 0.1, 0.1) if buys else (0.92, 0.03, 0.05, 0.0))))
            at += drawn.gamma(4.0, pace / 4.0)
    order = np.argsort(np.array(times), kind="stable")
    events = np.zeros(order.size, EVENT)
    events["at_ms"] = START_MS + (np.array(times)[order] * DAY_MS).astype(np.int64)
    events["item"], events["category"] = (drawn.integers(1, most, order.size) for most in (ITEMS, CATEGORIES))
    events["action"], events["offset"] = np.array(actions)[order], np.arange(order.size)
    events["topic"] = SOURCE.topic
    of_whom = np.array(users, np.uint64)[order]
    spread = np.uint64(0x9E3779B97F4A7C15)
    return Leavers(
        plain(of_whom * spread, events),
        {user * int(spread) % 2**64: at for user, at in left_ms.items()},
    )


def batches(clicks: Recorded, spec: FeatureSpec, rows: int = 256) -> Iterator[MicroBatch]:
    return micro_batches(clicks, spec, WEIGHTS, step_rows=rows)


def taken(learner: ChurnLearner, log: Iterator[MicroBatch]) -> Iterator[tuple[KnownExamples, F64]]:
    """What became known with each micro-batch, and what was said of it before it was learned."""
    log_ms = 0
    for batch in log:
        log_ms = max(log_ms, int(batch.at_ms.max()))
        learner.observe(batch)
        known = learner.waiting.known(log_ms)
        yield known, learner.learn(known)


def joined(parts: Iterator[tuple[KnownExamples, F64]]) -> tuple[KnownExamples, F64]:
    found = list(parts)
    columns = (np.concatenate([getattr(known, name) for known, _ in found]) for name in KnownExamples._fields)
    return KnownExamples(*columns), np.concatenate([told for _, told in found])
