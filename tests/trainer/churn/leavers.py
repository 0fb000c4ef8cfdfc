"""Made-up shoppers who come at a pace of their own, and one day for the last time: when is known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from state.features.spec import EVENT, FeatureSpec
from state.microbatch.batch import MicroBatch
from tests.bench.recorded import SOURCE, Recorded, micro_batches, plain
from trainer.churn.learning import ChurnLearner, KnownExamples

DAY_MS = 86_400_000
START_MS = 1_790_000_000_000
CATEGORIES, ITEMS = 40, 2000
WEIGHTS = (1.0, 1.0, 1.0, 1.0)

F64 = npt.NDArray[np.float64]


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
    """The micro-batches of clicks."""
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
    """All of it."""
    found = list(parts)
    columns = (np.concatenate([getattr(known, name) for known, _ in found]) for name in KnownExamples._fields)
    return KnownExamples(*columns), np.concatenate([told for _, told in found])
