"""Progressive measures against their batch definitions."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.measures.evaluation import Evaluation, area_under_curve


def updated(evaluation: Evaluation, rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    step = {
        "log_loss": rng.random(rows).astype(np.float32),
        "top1": rng.random(rows) < 0.4,
        "top5": rng.random(rows) < 0.7,
        "known": rng.random(rows) < 0.9,
        "scores": rng.normal(0, 2, 2 * rows).astype(np.float32),
        "positive": np.arange(2 * rows) < rows,
        "engagement_log_loss": rng.random(2 * rows).astype(np.float32),
    }
    evaluation.update(**step)
    return step


def test_totals_equal_the_batch_definition() -> None:
    evaluation, rng = Evaluation(), np.random.default_rng(3)
    steps = [updated(evaluation, rng, rows) for rows in (10, 200, 1, 500)]
    joined = {name: np.concatenate([step[name] for step in steps]) for name in steps[0]}
    values = evaluation.values()
    assert values["total.training_loss"] == pytest.approx(joined["log_loss"].mean())
    assert values["total.top1"] == pytest.approx(joined["top1"].mean())
    assert values["total.new.top5"] == pytest.approx(joined["top5"][~joined["known"]].mean())
    assert values["total.engagement_log_loss"] == pytest.approx(joined["engagement_log_loss"].mean())


def test_area_is_that_of_all_pairs() -> None:
    evaluation, rng = Evaluation(), np.random.default_rng(4)
    step = updated(evaluation, rng, 400)
    positives, negatives = step["scores"][step["positive"]], step["scores"][~step["positive"]]
    pairs = (positives[:, None] > negatives).mean() + (positives[:, None] == negatives).mean() / 2
    assert evaluation.values()["total.auc"] == pytest.approx(pairs, abs=0.005)
    assert area_under_curve(np.zeros(2), np.ones(2)) is None


def test_recent_measures_forget_and_totals_do_not() -> None:
    evaluation = Evaluation()
    for hit in (True, False):
        for _ in range(200):
            rows = np.full(1000, hit)
            empty = np.zeros(0, np.float32)
            evaluation.update(np.ones(1000, np.float32), rows, rows, rows, empty, np.zeros(0, bool), empty)
    values = evaluation.values()
    assert values["total.top1"] == pytest.approx(0.5)
    assert values["top1"] < 0.01


def test_state_continues_with_the_same_bits() -> None:
    one, other, rng = Evaluation(), Evaluation(), np.random.default_rng(5)
    updated(one, rng, 50)
    other.load(one.state())
    updated(one, np.random.default_rng(6), 50)
    updated(other, np.random.default_rng(6), 50)
    assert one.values() == other.values()
    assert all((one.state()[name] == value).all() for name, value in other.state().items())
