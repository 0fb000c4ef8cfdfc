"""Churn in versions and in the trainer's memory: measured, restored, limited and forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from state.churn import Horizon
from state.features.erased import MaskedUsers
from state.features.spec import FeatureSpec
from state.microbatch.codec import decode
from state.registry.registry import SERVING
from tests.trainer.clicks import microbatch, small_settings
from tests.trainer.logs import (
    append,
    fresh,
    learner,
    run_to_end,
    started,
    trainer_of,
    with_weight,
    written,
)
from tests.trainer.test_verify import started_with_spec
from trainer import verify
from trainer.churn import NEVER_MS, ChurnLearner, ChurnWaiting, KnownExamples
from trainer.engine.guard import Verdict
from trainer.learner import Learner
from trainer.tables.index import hashed_uniform
from trainer.versions import checkpoint, content
from trainer.versions.content import CrossedIds
from trainer.versions.content import without as without_users

RECORDS = [microbatch(number) for number in range(24)]
ON = ("--churn.days", "0.002")
"""Some 173 s: a record in this log is 150 s after the one before."""


def churn_of(running: Learner) -> ChurnLearner:
    found = trainer_of(running).churn
    assert found is not None
    return found


def bits(held: dict[str, npt.NDArray[np.generic]]) -> dict[str, bytes]:
    return {name: one.tobytes() for name, one in held.items()}


def test_a_version_has_measures_weights_and_code_and_is_recomputed(tmp_path: Path) -> None:
    registry, log = started_with_spec(tmp_path), written(RECORDS)
    running = learner(registry, log, *ON)
    run_to_end(running)
    running.close()
    newest = registry.newest(1) or 0
    made = registry.manifest(newest)
    assert made.environment["churn.days"] == "0.002" and int(made.environment["churn.code"]) >= 1
    assert made.metrics["churn.total.rows"] > 200
    assert 0 < made.metrics["churn.log_loss"] < 2 and 0 < made.metrics["churn.auc"] < 1
    assert "churn.weights" in content.decode([registry.read(newest, SERVING)])

    def asked(*flags: str) -> verify.Comparison:
        return verify.verify(
            small_settings(*flags), registry, newest, 1, lambda: fresh(*flags),
            log,
        )  # fmt: skip

    found = asked(*ON)
    assert found.outcome == "equal", found.text()
    assert asked().environment == (
        *(f"churn.{name} was {made.environment[f'churn.{name}']} and is off" for name in ("code", "days")),
    )


def test_a_skipped_step_counts_as_one_that_was_learned() -> None:
    found = []
    for weight in (1.0, float("nan")):
        trainer = fresh(*ON)
        for value in RECORDS[:8]:
            trainer.step(decode(value))
        report = trainer.step(decode(with_weight(RECORDS[8], weight)))
        assert trainer.churn is not None
        found.append((report.verdict, bits(trainer.churn.state())))
    assert [verdict for verdict, _ in found] == [Verdict.ACCEPT, Verdict.SKIP]
    assert found[0][1] == found[1][1]


def test_an_erased_user_waits_neither_in_the_trainer_nor_in_earlier_versions() -> None:
    trainer = fresh(*ON)
    for value in RECORDS[:8]:
        trainer.step(decode(value))
    assert trainer.churn is not None
    before = checkpoint.full(trainer)
    user = before["state.churn.waiting.user"][:1].copy()
    rewritten = without_users(before, MaskedUsers.of(user.tolist()), CrossedIds(trainer.crosses).see(before))
    trainer.forget(user)
    held = checkpoint.full(trainer)
    for kept in (rewritten, held):
        assert user[0] not in kept["state.churn.waiting.user"]
        assert 0 < len(kept["state.churn.waiting.user"]) < len(before["state.churn.waiting.user"])
        assert {
            len(one) for name, one in kept.items() if name.startswith("state.churn.waiting.") and name[-6:] != "counts"
        } == {len(kept["state.churn.waiting.user"])}


def test_churn_is_switched_on_off_and_to_another_span(tmp_path: Path) -> None:
    registry, log, spans = started(tmp_path), written([]), ((), ON, ("--churn.days", "0.004"), ())
    for number, flags in enumerate(spans):
        append(log, RECORDS[6 * number : 6 * number + 6])
        running = learner(registry, log, *flags)
        if flags:
            assert churn_of(running).values()["churn.total.rows"] == 0, "it begins anew"
        run_to_end(running)
        running.close()
        names = content.decode(
            registry.read(registry.newest(1) or 0, name) for name in registry.manifest(registry.newest(1) or 0).files
        )
        assert any(name.startswith("state.churn.") for name in names) == bool(flags)
        if flags:
            assert len(churn_of(running).waiting) > 0


def test_without_churn_days_a_version_has_nothing_of_churn() -> None:
    trainer = fresh()
    trainer.step(decode(RECORDS[0]))
    assert trainer.churn is None
    tensors = checkpoint.full(trainer).keys() | checkpoint.served(trainer).keys()
    assert not [name for name in (*tensors, *checkpoint.deciding(trainer.settings)) if "churn" in name]


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


def read(parts: Sequence[Part]) -> list[tuple[Any, ...]]:
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
        for (at_ms, _, clicked), following in zip(held, [*held[1:], None], strict=True):
            first = hashed_uniform(np.array([user ^ at_ms], np.uint64), 1, "churn.moments")[0, 0]
            moment = at_ms + int((float(first) + 1.0) * (DAY_MS / 2))
            while moment < at_ms + HORIZON.reach_ms:
                known_at = next((n for n, end in enumerate(ends) if end > moment + HORIZON.span_ms + LATE_MS), None)
                next_ms = NEVER_MS if following is None or known_at is None or following[1] > known_at else following[0]
                if known_at is None or next_ms <= moment:
                    break
                left = next_ms > moment + HORIZON.span_ms
                found.append((known_at, user, moment, moment - at_ms, left, *clicked))
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
