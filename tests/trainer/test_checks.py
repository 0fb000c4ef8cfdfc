"""A tower of the user's own is checked before anything is trained, and refused in the user's terms; a good one trains."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from state.config.sections import Model as ModelSettings
from state.errors import ProgramError, SettingsError
from state.features.spec import FeatureSpec
from state.process.part import OPTIONS_READ
from tests.trainer.clicks import SPEC, batches, small_settings
from tests.trainer.logs import fresh, write_transform
from trainer import loop
from trainer.checks import check_model
from trainer.model.tower import width_in
from trainer.model_checks import check_tower
from trainer.versions.program import build as build_program

EXAMPLE = "deploy.examples.own_model.tower:build"

Call = Callable[[Any, Any, bool, Any], Any]


class Tower(tf.Module):
    """One matrix, and what a test makes of it."""

    def __init__(self, width_in: int, settings: ModelSettings, call: Call, seed: int | None = 7) -> None:
        super().__init__()
        drawn = np.random.default_rng(seed).normal(0, 0.1, (width_in, settings.hidden[-1])).astype(np.float32)
        self.kernel = tf.Variable(drawn, name="kernel")
        self.calls = tf.Variable(0.0, trainable=False, name="calls")
        self._call = call

    def __call__(self, x: Any, training: bool, seed: Any) -> Any:
        return self._call(self, x, training, seed)


def counting(tower: Any, x: Any, training: bool, seed: Any) -> Any:
    tower.calls.assign_add(1.0)
    return x @ tower.kernel


CALLS: dict[str, tuple[Call, str]] = {
    "bessel": (lambda t, x, *_: tf.math.bessel_i0e(x @ t.kernel), r"does not lower to LiteRT: it has no tf\.BesselI0e"),
    "narrow": (
        lambda t, x, *_: (x @ t.kernel)[:, :3],
        r"gave shape \[64, 3\] and type float32 for 64 rows; wanted is \[B, 8\]",
    ),
    "double": (
        lambda t, x, *_: tf.cast(x @ t.kernel, tf.float64),
        r"type float64 for 64 rows; wanted is \[B, 8\] float32",
    ),
    "random": (
        lambda t, x, *_: x @ t.kernel + tf.random.normal([]),
        r"draw from the seed with tf\.random\.stateless_\*",
    ),
    "counting": (counting, "changed a variable while it was called"),
    "centred": (
        lambda t, x, *_: (x - tf.reduce_mean(x, 0, keepdims=True)) @ t.kernel,
        "row 0 gives another output alone than in a batch of 64",
    ),
    "seeded": (
        lambda t, x, training, seed: x @ t.kernel * tf.cast(seed[0] + 1, tf.float32),
        "without training its output depends on the seed",
    ),
    "misspelt": (
        lambda t, x, *_: x @ t.kernle,
        r"called with x \[64, 152\] and training=False it raised AttributeError.*\(test_checks\.py:\d+\); wanted",
    ),
    "infinite": (lambda t, x, *_: tf.math.log(x @ t.kernel * 0.0), "its output is not finite"),
}


def builder(name: str) -> Callable[[int, ModelSettings], Tower]:
    return lambda width, settings: Tower(width, settings, CALLS[name][0])


for _name in CALLS:
    globals()[f"build_{_name}"] = builder(_name)


def build_by_chance(width: int, settings: ModelSettings) -> Tower:
    return Tower(width, settings, lambda t, x, *_: x @ t.kernel, seed=None)


def build_nothing(width: int, settings: ModelSettings) -> None:
    return None


def build_of_width(width: int) -> None:
    return None


def build_namesakes(width: int, settings: ModelSettings) -> Tower:
    tower = Tower(width, settings, lambda t, x, *_: x @ t.kernel)
    tower.other = tf.Variable(tf.zeros([3]), name="kernel")
    return tower


REFUSED = {f"build_{name}": message for name, (_, message) in CALLS.items()} | {
    "build_by_chance": "built twice its weight kernel begins with other values; draw first values from a fixed seed",
    "build_nothing": r"returned NoneType; wanted is build\(width_in: int, settings\) -> tf\.Module",
    "build_of_width": r"raised TypeError.*wanted is build\(width_in: int, settings\)",
}


def check(name: str) -> str:
    settings = ModelSettings(dim=8, hidden=(16, 8), popular=4, tower=name)
    return check_tower(settings, width_in(settings, SPEC, None))


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_tower_is_refused_with_what_is_expected(name: str) -> None:
    with pytest.raises(ProgramError, match=REFUSED[name]) as caught:
        check(f"{__name__}:{name}")
    assert str(caught.value).startswith(f"model.tower '{__name__}:{name}'")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:build", r"cannot be loaded \(ModuleNotFoundError"),
        (f"{__name__}:build_namesakes", "two weights of the tower are named 'kernel'"),
    ],
)
def test_a_tower_that_cannot_be_loaded_or_named_is_a_wrong_setting(name: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        check(name)


def test_the_default_tower_and_the_example_pass_and_their_weights_are_listed() -> None:
    assert "kernel_0 [152, 16]" in check(ModelSettings().tower)
    said = check(EXAMPLE)
    assert "[B, 152] to [B, 8]" in said and "cross_in [152, 32]" in said and "lowers to LiteRT" in said


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ("temperature=0.5", ""),
        ("temperature=0.5,steps=3", ""),
        ("temperatur=0.5", "model.options temperatur=0.5: neither ranker, tower nor preprocessing read it"),
        ("temperature=0.5,heads=3", "the names read are steps, temperature; correct the name, take it out, or read it"),
    ],
)
def test_an_option_that_neither_ranker_nor_preprocessing_reads_is_refused(
    options: str, refused: str, tmp_path: Path
) -> None:
    write_transform(tmp_path)
    # What the check of the preprocessing leaves next to its graph.
    (tmp_path / "transform" / OPTIONS_READ).write_text('["steps"]')
    flags = ["--model.ranker", "deploy.examples.two_tower.ranker:build", "--features.sequence", "3"]
    flags += ["--model.hidden", "8", "--model.options", options, "--paths.state", str(tmp_path / "state")]
    settings = small_settings(*flags)
    spec = FeatureSpec.from_settings(settings)
    if refused:
        with pytest.raises(SettingsError) as caught:
            check_model(settings, spec, tmp_path / "transform")
        assert refused in str(caught.value)
    else:
        assert "lowers to LiteRT" in check_model(settings, spec, tmp_path / "transform")


def test_an_option_that_the_default_functions_do_not_read_is_refused(tmp_path: Path) -> None:
    settings = small_settings("--model.options", "heads=4", "--paths.state", str(tmp_path / "state"))
    with pytest.raises(
        SettingsError, match="heads=4: neither ranker, tower nor preprocessing read it; no name was read"
    ):
        check_model(settings, FeatureSpec.from_settings(settings), None)


def test_a_custom_tower_trains_and_its_program_gives_the_same_answers() -> None:
    trainer = fresh("--model.tower", EXAMPLE)
    before = trainer.model.weights()
    losses = [trainer.step(batch).interest_log_loss for batch in batches(0, 40)]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    after = trainer.model.weights()
    for name in ("kernel_0", "cross_in", "cross_hidden", "cross_out", "kernel_1", "kernel_2", "bias_0"):
        assert (before[f"tower.{name}"] != after[f"tower.{name}"]).any(), f"{name} was not trained"
    build_program(trainer.model)


def test_the_trainer_refuses_it_before_any_wait(tmp_path: Path) -> None:
    settings = small_settings(
        "--model.tower", f"{__name__}:build_bessel", "--trainer.metrics_port", "0", "--paths.state", str(tmp_path)
    )
    with pytest.raises(ProgramError, match=r"does not lower to LiteRT: it has no tf\.BesselI0e"):
        loop.run(settings, [], threading.Event())
    assert not list((settings.registry_dir / "control").iterdir())
