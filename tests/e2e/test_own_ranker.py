"""An example of a ranker of one's own, with the real processes: checked, bootstrapped, trained, served.

What every ranker promises is held by `tests/conformance`; the other example is in it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from state.config.loading import load
from state.features.spec import FeatureSpec
from tests.e2e.running import ROOT, SHORT, Loop

EXAMPLES = ROOT / "deploy" / "examples"


@pytest.mark.parametrize("name", ["din", "two_tower"])
def test_the_readme_of_an_example_names_its_settings(name: str) -> None:
    assert f"--config deploy/examples/{name}/springtide.toml" in (EXAMPLES / name / "README.md").read_text()


def test_a_ranker_of_ones_own_trains_publishes_and_answers(tmp_path: Path) -> None:
    toml = EXAMPLES / "din" / "springtide.toml"
    wanted = load(["--config", str(toml)], env={})
    loop = Loop(tmp_path, {**SHORT, "config": toml})
    assert loop.settings.model == wanted.model
    loop.start()
    try:
        assert f"model.ranker '{wanted.model.ranker}'" in loop.said().split("1/9")[0], "checked before the first step"
        user, category = "ada-of-din", "category-of-her-own"
        ends = loop.click([(user, f"item-{number}", category, "purchase") for number in range(20)])
        answer = loop.answer_trained_on(user, ends, item="item-3", category=category)
        assert category in [one["label"] for one in answer["interests"]]
        assert len(answer["vector"]) == wanted.model.hidden[-1]
        assert np.isfinite(answer["vector"]).all()
        assert 0.0 < answer["engagement"]["probability"] < 1.0
        assert (loop.metrics("trainer").total("springtide_trainer_steps_total") or 0) > 0
        assert FeatureSpec.from_settings(loop.settings).sequence == 20
        assert loop.stop() == 0
    finally:
        if loop.running:
            loop.stop()
