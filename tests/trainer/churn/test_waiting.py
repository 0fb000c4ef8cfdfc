"""The rows that wait: examples and labels are those that one reads off the log, whatever is restarted or left out in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from state.churn import Horizon
from state.features.spec import FeatureSpec
from trainer.churn.learning import NEVER_MS, ChurnWaiting, KnownExamples
from trainer.tables.index import hashed_uniform

HOUR_MS, DAY_MS = 3_600_000, 86_400_000
START_MS = 1_790_000_000_000
LATE_MS = 600_000
COLUMNS = np.array([1, 4])
HORIZON = Horizon.of(2 * DAY_MS, FeatureSpec())
MANY = 100_000


class Part(NamedTuple):
    """Rows of one step."""

    user: npt.NDArray[np.uint64]
    at_ms: npt.NDArray[np.int64]
    features: npt.NDArray[np.uint16]
    action: npt.NDArray[np.uint8]


def log(seed: int = 1, parts: int = 60, users: int = 80) -> list[Part]:
    """Four weeks of clicks: sessions, gaps of weeks, clicks of one moment, some that come hours too late, and nobody's."""
    drawn = np.random.default_rng(seed)
    found = []
    for number in range(parts):
        rows = int(drawn.integers(1, 60))
        user = np.minimum(drawn.zipf(1.4, rows), users).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        user[drawn.random(rows) < 0.05] = 0
        at_ms = START_MS + number * 28 * DAY_MS // parts + np.sort(drawn.integers(0, 30, rows)) * 600_000
        at_ms[drawn.random(rows) < 0.1] -= 5 * HOUR_MS
        features = drawn.integers(0, 1000, (rows, 6)).astype(np.uint16)
        found.append(Part(user, at_ms, features, drawn.integers(0, 4, rows).astype(np.uint8)))
    return found


def read(parts: Sequence[Part]) -> list[tuple[object, ...]]:
    """The examples as one reads them off the log: (step, user, moment, age, left, windows, action)."""
    rows: dict[int, list[tuple[int, int, tuple[object, ...]]]] = {}
    log_ms, ends = 0, []
    for step, part in enumerate(parts):
        log_ms = max(log_ms, int(part.at_ms.max()))
        ends.append(log_ms)
        known = {user: held[-1][0] for user, held in rows.items()}
        for row in np.argsort(part.at_ms, kind="stable"):
            user, at_ms = int(part.user[row]), int(part.at_ms[row])
            if user and at_ms >= known.get(user, 0):
                what = (tuple(part.features[row, COLUMNS].tolist()), int(part.action[row]))
                rows.setdefault(user, []).append((at_ms, step, what))
    found = []
    for user, held in rows.items():
        for (at_ms, _, what), following in zip(held, [*held[1:], None], strict=True):
            first = hashed_uniform(np.array([user ^ at_ms], np.uint64), 1, "churn.moments")[0, 0]
            moment = at_ms + int((float(first) + 1.0) * (DAY_MS / 2))
            while moment < at_ms + HORIZON.reach_ms:
                step = next((n for n, end in enumerate(ends) if end > moment + HORIZON.span_ms + LATE_MS), None)
                next_ms = NEVER_MS if following is None or step is None or following[1] > step else following[0]
                if step is None or next_ms <= moment:
                    break
                left = next_ms > moment + HORIZON.span_ms
                found.append((step, user, moment, moment - at_ms, left, *what))
                moment += DAY_MS
    return sorted(found)


def told(step: int, known: KnownExamples) -> list[tuple[object, ...]]:
    columns = (known.user, known.moment_ms, known.age_ms, known.left, known.windows, known.action)
    return [
        (step, user, moment, age, left, tuple(windows), action)
        for user, moment, age, left, windows, action in zip(*(one.tolist() for one in columns), strict=True)
    ]


def take(waiting: ChurnWaiting, parts: Sequence[Part], first: int = 0, log_ms: int = 0) -> list[tuple[object, ...]]:
    found = []
    for step, part in enumerate(parts[first:], first):
        log_ms = max(log_ms, int(part.at_ms.max()))
        waiting.observe(*part)
        found += told(step, waiting.known(log_ms))
    return found


def test_examples_and_labels_equal_a_plain_reading_of_the_log() -> None:
    parts = log()
    expected = read(parts)
    assert sorted(take(ChurnWaiting(HORIZON, LATE_MS, MANY, COLUMNS), parts)) == expected
    lefts, ages = [one[4] for one in expected], [one[3] for one in expected]
    assert 50 < sum(lefts) < len(lefts) - 50
    assert max(ages) > 6 * DAY_MS, "users are asked about long after their last click"


def test_waiting_examples_are_limited_and_the_rest_stays_right() -> None:
    parts, small, large = (
        log(4, users=400),
        ChurnWaiting(HORIZON, LATE_MS, 60, COLUMNS),
        ChurnWaiting(HORIZON, LATE_MS, MANY, COLUMNS),
    )
    every, found, log_ms = set(take(large, parts)), [], 0
    for step, part in enumerate(parts):
        log_ms = max(log_ms, int(part.at_ms.max()))
        small.observe(*part)
        assert len(small) <= 60
        found += told(step, small.known(log_ms))
    assert small.dropped > 0
    assert 100 < len(found) < len(every)
    assert set(found) <= every


def test_no_example_of_a_forgotten_user_waits() -> None:
    parts, waiting = log(5), ChurnWaiting(HORIZON, LATE_MS, MANY, COLUMNS)
    take(waiting, parts[:30])
    user = waiting.state()["user"][:1]
    before = len(waiting)
    assert waiting.forget(user) == before - len(waiting) > 0
    assert user not in waiting.state()["user"]
    found = told(0, waiting.known(START_MS + 60 * DAY_MS))
    assert found
    assert not any(one[1] == int(user[0]) for one in found)
