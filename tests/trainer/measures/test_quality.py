"""Learning on real clicks: the model is worth more than remembering the last category."""

from __future__ import annotations

import pytest

from tests.bench.quality import train, train_impressions
from tests.bench.recorded import CLICKS, KUAIRAND


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


@pytest.mark.skipif(not KUAIRAND.exists(), reason="needs KuaiRand-Pure at ../shared/data/kuairand")
def test_one_pass_over_impressions_predicts_clicks_within_twenty_steps() -> None:
    found = train_impressions(steps=20)
    assert found["auc"] > 0.68
    assert found["log_loss"] < 0.63
