"""A probability of engagement is the share of those who engage, over one recorded run of real impressions."""

from __future__ import annotations

from itertools import islice

import numpy as np
import numpy.typing as npt
import pytest

from state.features.spec import FeatureSpec
from tests.bench.recorded import KUAIRAND, kuairand_settings, micro_batches, read_impressions
from trainer.engine.step import Trainer
from trainer.measures.breakdown import DECILES

pytestmark = pytest.mark.skipif(not KUAIRAND.exists(), reason="needs KuaiRand-Pure at ../shared/data/kuairand")

STEPS = 8
LEARNED = 2 * 1024
"""Rows that are learned from before probabilities are held against shares."""

F64 = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def scored() -> tuple[F64, F64]:
    """`[n]` float64 each: labels of impressions, and their probabilities before they were learned from."""
    settings = kuairand_settings()
    spec, recorded = FeatureSpec.from_settings(settings), read_impressions(settings)
    trainer = Trainer(settings, spec)
    batches = islice(micro_batches(recorded, spec, settings.events.action_weights), STEPS)
    reports = [trainer.step(batch) for batch in batches]
    logits = np.concatenate([report.scores.astype(np.float64) for report in reports])
    labels = np.concatenate([report.positive.astype(np.float64) for report in reports])
    return labels[LEARNED:], 1 / (1 + np.exp(-logits[LEARNED:]))


@pytest.mark.parametrize("decile", range(DECILES))
def test_a_probability_is_the_share_of_those_who_engage(scored: tuple[F64, F64], decile: int) -> None:
    """What a bid is multiplied with: in each tenth of the impressions by probability, within 0.05 beyond what chance allows
    at three deviations."""
    label, predicted = scored
    tenth = np.array_split(np.argsort(predicted, kind="stable"), DECILES)[decile]
    share = float(predicted[tenth].mean())
    chance = 3 * float(np.sqrt(share * (1 - share) / len(tenth)))
    assert abs(float(label[tenth].mean()) - share) < 0.05 + chance
