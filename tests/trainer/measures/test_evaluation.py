"""Measures of what is learned."""

from __future__ import annotations

from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from evaluation import measures
from state.features.spec import FeatureSpec
from tests.bench.quality import train
from tests.bench.recorded import CLICKS, KUAIRAND, kuairand_settings, micro_batches, read_impressions
from trainer.engine.step import Trainer
from trainer.measures.evaluation import Evaluation, area_under_curve
from trainer.measures.slices import DECILES


def updated(evaluation: Evaluation, rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    step: dict[str, Any] = {
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


pytestmark = pytest.mark.skipif(not KUAIRAND.exists(), reason="needs KuaiRand-Pure at ../shared/data/kuairand")

STEPS, JUDGED_STEPS = 20, 8
LEARNED = 2 * 1024
"""Rows that are learned from before probabilities are held against shares."""

F64 = npt.NDArray[np.float64]


class Impressions(NamedTuple):
    """Impressions that were learned from in one pass, `[n]` each: whether they were clicked, and the probability before."""

    clicked: npt.NDArray[np.bool_]
    predicted: F64


@pytest.fixture(scope="module")
def impressions() -> Impressions:
    settings = kuairand_settings()
    spec, recorded = FeatureSpec.from_settings(settings), read_impressions(settings)
    trainer = Trainer(settings, spec)
    batches = islice(micro_batches(recorded, spec, settings.events.action_weights), STEPS)
    pairs = [judged.pairs for batch in batches for judged in trainer.step(batch).judged]
    return Impressions(*(np.concatenate([getattr(part, name) for part in pairs]) for name in ("positive", "predicted")))


@pytest.mark.parametrize("decile", range(DECILES))
def test_a_probability_is_the_share_of_those_who_engage(impressions: Impressions, decile: int) -> None:
    """What a bid is multiplied with: in each tenth of the impressions by probability, within 0.05 beyond what chance allows
    at three deviations."""
    judged = slice(LEARNED, JUDGED_STEPS * 1024)
    label, predicted = impressions.clicked[judged], impressions.predicted[judged]
    tenth = np.array_split(np.argsort(predicted, kind="stable"), DECILES)[decile]
    share = float(predicted[tenth].mean())
    chance = 3 * float(np.sqrt(share * (1 - share) / len(tenth)))
    assert abs(float(label[tenth].mean()) - share) < 0.05 + chance


@pytest.mark.nightly
@pytest.mark.skipif(not CLICKS.exists(), reason="needs Taobao's UserBehavior.csv at ../shared/data/taobao")
def test_one_pass_beats_the_previous_category_within_forty_steps() -> None:
    found = train(steps=40)
    assert found["top1"] > 0.38
    assert found["above previous category.top1"] > found["above previous category.top1.interval"]
    assert found["top1"] > 4 * found["popular so far.top1"]
    assert found["total.auc"] > 0.8
    # The trainer's own account of what is simple.
    assert found["total.lift.top1"] > 0.01
    assert found["total.lift.log_loss"] > 0.5
    assert found["log_loss"] == pytest.approx(found["total.log_loss"], abs=1e-6)


def test_one_pass_over_impressions_predicts_clicks_within_twenty_steps(impressions: Impressions) -> None:
    clicked, predicted = impressions.clicked, impressions.predicted
    assert len(clicked) == STEPS * 1024
    assert measures.area_under_curve(impressions.predicted, clicked).value > 0.68
    assert -np.log(np.where(clicked, predicted, 1.0 - predicted)).mean() < 0.63
