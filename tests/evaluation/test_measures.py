"""Figures and intervals against naive computations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evaluation.measures import OURS, area_under_curve, figure, half_width, mean, ratio, table
from evaluation.report import engagement_estimates, rank_estimates

RANDOM = np.random.default_rng(5)


def test_the_area_is_the_share_of_pairs_in_order() -> None:
    scores, positive = RANDOM.integers(0, 20, 200).astype(float), RANDOM.random(200) < 0.3
    pairs = [(s > t) + (s == t) / 2 for s in scores[positive] for t in scores[~positive]]
    found = area_under_curve(scores, positive)
    assert found.value == pytest.approx(np.mean(pairs))
    assert found.influence.sum() == pytest.approx(0.0, abs=1e-9)
    assert math.isnan(area_under_curve(scores, np.ones(200, np.bool_)).value)


def test_ranks_give_recall_and_gain() -> None:
    ranks = RANDOM.integers(-5, 20, 300)
    found = {name: estimate.value for name, estimate in rank_estimates(ranks).items()}
    hits = [rank for rank in ranks.tolist() if rank >= 0]
    assert found["recall@10"] == pytest.approx(sum(rank < 10 for rank in hits) / 300)
    assert found["recall@20"] == pytest.approx(len(hits) / 300)
    assert found["mrr"] == pytest.approx(sum(1 / (rank + 1) for rank in hits) / 300)
    assert found["ndcg@20"] == pytest.approx(sum(1 / math.log2(rank + 2) for rank in hits) / 300)


def test_calibration_is_predicted_over_observed_clicks() -> None:
    predicted, clicked = np.array([0.2, 0.4, 0.9]), np.array([False, False, True])
    found = engagement_estimates(predicted, clicked)
    assert found["calibration"].value == pytest.approx(1.5)
    assert found["log_loss"].value == pytest.approx(-np.log([0.8, 0.6, 0.9]).mean())


@pytest.mark.parametrize("measure", ["mean", "ratio", "area"])
def test_an_interval_is_that_of_a_bootstrap_over_users(measure: str) -> None:
    random = np.random.default_rng(11)
    users = np.repeat(np.arange(150), random.integers(1, 12, 150))
    # Rows of one user are alike.
    level = random.normal(0, 1, 150)[users] + random.normal(0, 1, users.size)
    positive = random.random(users.size) < 1 / (1 + np.exp(-level))
    scores = level + random.normal(0, 1, users.size)

    def estimate(rows: np.ndarray) -> float:
        if measure == "mean":
            return float(positive[rows].mean())
        if measure == "ratio":
            return ratio(np.abs(scores[rows]), positive[rows]).value
        return area_under_curve(scores[rows], positive[rows]).value

    rows_of = [np.flatnonzero(users == user) for user in range(150)]
    drawn = [estimate(np.concatenate([rows_of[user] for user in random.integers(0, 150, 150)])) for _ in range(600)]
    made = {
        "mean": mean(positive),
        "ratio": ratio(np.abs(scores), positive),
        "area": area_under_curve(scores, positive),
    }[measure]
    assert half_width(made.influence, users) == pytest.approx(1.96 * np.std(drawn), rel=0.15)


def test_equal_predictors_differ_by_nothing_and_better_ones_by_their_distance() -> None:
    users, ours = np.arange(100), (np.arange(100) % 2).astype(float)
    made = table(
        "all", users, {OURS: {"top1": mean(ours)}, "same": {"top1": mean(ours)}, "none": {"top1": mean(0 * ours)}}
    )
    same, none = made.scores[1].difference["top1"], made.scores[2].difference["top1"]
    assert (same.value, same.interval) == (0.0, 0.0)
    assert none.value == 0.5 and none.interval == pytest.approx(1.96 * 0.05, rel=0.01)
    assert not made.scores[0].difference
    assert (made.rows, made.users) == (100, 100)


def test_a_figure_of_one_user_has_no_interval() -> None:
    assert figure(mean(np.ones(3)), np.zeros(3)).interval is None
