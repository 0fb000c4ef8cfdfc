"""The program: it answers as the model does, from any version's weights, and says what does not lower."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from state.config.loading import load
from state.config.sections import Model as ModelSettings
from state.errors import ProgramError
from state.features.spec import FeatureSpec
from state.registry.control import start
from state.registry.manifest import Draft, LogRange, Manifest
from state.registry.registry import Registry
from trainer.engine.step import Trainer
from trainer.model.default_ranker import DefaultRanker
from trainer.model.preprocessing import preprocessing_of
from trainer.versions.lowering import answers, build, lower
from trainer.versions.program import Program, check_parity, sample
from trainer.versions.starting import program_of

SMALL = ModelSettings(dim=8, hidden=(16, 8), popular=4)
FLAGS = ("--model.dim", "8", "--model.hidden", "16,8", "--model.popular", "4")
ENVIRONMENT = {"tensorflow": "2.21.0"}


@pytest.fixture(scope="module")
def model() -> DefaultRanker:
    return DefaultRanker(SMALL, FeatureSpec())


def parity(content: bytes, model: DefaultRanker) -> float:
    return check_parity(content, model.weights(), partial(answers, model), sample(model), "the test's model")


@pytest.fixture(scope="module")
def lowered(model: DefaultRanker) -> bytes:
    return build(model)


def test_the_program_answers_as_the_model_does_with_each_versions_weights(model: DefaultRanker, lowered: bytes) -> None:
    before, program, inputs = model.weights(), Program(lowered), sample(model, 5)
    for scale in (-0.5, 1.0):
        model.set_weights({name: weight * np.float32(scale) for name, weight in before.items()})
        program.load(model.weights())
        ours, theirs = program.predict(inputs), model.predict(inputs)
        assert set(ours) == {
            "recent_logits",
            "popular_logits",
            "successor_logits",
            "engagement_logit",
            "vector",
            "item_query",
        }
        for name, values in ours.items():
            np.testing.assert_allclose(values, theirs[name], rtol=1e-4, atol=1e-5)


def test_lowering_leaves_the_weights_and_gives_the_same_bytes_again(lowered: bytes) -> None:
    again = DefaultRanker(SMALL, FeatureSpec())
    before = again.weights()
    assert lower(again) == lowered
    for name, weight in again.weights().items():
        np.testing.assert_array_equal(weight, before[name])


def test_a_parity_failure_is_an_error(model: DefaultRanker, lowered: bytes) -> None:
    other = DefaultRanker(SMALL, FeatureSpec(), preprocessing=lambda x: tf.sqrt(x))
    with pytest.raises(ProgramError, match="differs from the model's"):
        parity(lowered, other)
    wider = DefaultRanker(ModelSettings(dim=8, hidden=(32, 8), popular=4), FeatureSpec())
    with pytest.raises(ProgramError, match=r"dense_tower_bias_0 have shape \[32\], and its program wants \[16\]"):
        parity(lowered, wider)


def test_a_saved_transform_is_part_of_the_program(tmp_path: Path) -> None:
    class Transform(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = tf.Variable(tf.fill([128], 2.0))

        @tf.function(input_signature=[{"features": tf.TensorSpec([None, 128], tf.float32)}])
        def transform_fn(self, inputs: dict[str, Any]) -> dict[str, Any]:
            return {"features": (tf.math.log1p(inputs["features"]) - self.mean)[:, :100]}

    tf.saved_model.save(Transform(), str(tmp_path / "transform_fn"))
    model = DefaultRanker(SMALL, FeatureSpec(), preprocessing_of(tmp_path))
    assert parity(lower(model), model) < 1e-5


def test_the_program_of_the_newest_version_is_used_again_only_if_it_computes_the_models_outputs(
    tmp_path: Path, model: DefaultRanker
) -> None:
    registry = Registry(tmp_path)
    other = build(DefaultRanker(SMALL, FeatureSpec(), lambda x: x))

    def version(program: str) -> Manifest:
        draft = Draft("base", 1, None, LogRange(), (), 1, 1, 5, 4, "spec", program, "salt", environment=ENVIRONMENT)
        return registry.publish(draft, {})

    registry.propose(start(actor="anna", reason="a test", now_ms=1))
    trainer = Trainer(load([*FLAGS, "--trainer.device", "cpu"], env={}), FeatureSpec())
    assert trainer.engine.name == "compiled"
    made = program_of(registry, version(registry.specs.add_program(other)), "spec", ENVIRONMENT, trainer)
    parity(registry.specs.program(made), model)
    # A comment at the end makes the bytes differ from what lowering gives.
    marked = registry.specs.add_program(registry.specs.program(made) + b"older")
    assert program_of(registry, version(marked), "spec", ENVIRONMENT, trainer) == marked
    assert program_of(registry, version(marked), "spec", {"tensorflow": "other"}, trainer) == made
