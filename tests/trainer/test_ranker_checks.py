"""A ranker of one's own is checked before anything is trained, learns within the step, and each refusal is one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from deploy.examples.two_tower.ranker import TwoTower
from state.config.loading import load
from state.config.sections import Model
from state.errors import ProgramError, SettingsError
from state.features.spec import FeatureSpec
from state.microbatch.batch import SEQUENCES
from tests.trainer.batches import micro_batch
from tests.trainer.clicks import small_settings
from trainer.engine.build import engine_name
from trainer.engine.step import Trainer
from trainer.model.inputs import Input, own_rows, pick
from trainer.model_checks import check_ranker

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
FLAGS = ("--features.sequence", "6", "--model.hidden", "8", "--model.dim", "8")


def wanted(name: str) -> str:
    return f"deploy.examples.{name}.ranker:build"


class Remembering(TwoTower):
    def encode(self, inputs: Any, training: bool, seed: Any) -> Any:
        self.dense["pair"].assign_add([0.1, 0.0])
        return super().encode(inputs, training, seed)


class Together(TwoTower):
    def encode(self, inputs: Any, training: bool, seed: Any) -> Any:
        found = super().encode(inputs, training, seed)
        return found - tf.reduce_mean(found, 0, keepdims=True)


class Lottery(TwoTower):
    def encode(self, inputs: Any, training: bool, seed: Any) -> Any:
        return super().encode(inputs, training, seed) + tf.random.stateless_normal([1, 8], seed)


class Narrow(TwoTower):
    def losses(self, encoded: Any, inputs: Any, targets: Any) -> Any:
        return tf.reduce_sum(super().losses(encoded, inputs, targets))


class Boasting(TwoTower):
    def item_query(self, encoded: Any) -> Any:
        return encoded


class Wide(TwoTower):
    def item_query(self, encoded: Any) -> Any:
        return tf.concat([encoded, encoded], 1)


class Idle(TwoTower):
    def __init__(self, settings: Model, spec: FeatureSpec, preprocessing: Any = None) -> None:
        super().__init__(settings, spec, preprocessing)
        self.dense["idle"] = tf.Variable([0.0], name="idle")


class Forgetful(TwoTower):
    def __init__(self, settings: Model, spec: FeatureSpec, preprocessing: Any = None) -> None:
        super().__init__(settings, spec, preprocessing)
        self.pair = self.dense["pair"]
        self.dense = {name: weight for name, weight in self.dense.items() if name != "pair"}

    def _pair(self, user: Any, item: Any, category: Any) -> Any:
        return self.pair[0] * self._scores(user, tf.expand_dims(item + category, 1))[:, 0] + self.pair[1]


class Bessel(TwoTower):
    def encode(self, inputs: Any, training: bool, seed: Any) -> Any:
        return tf.math.bessel_i0e(super().encode(inputs, training, seed))


class Chance(TwoTower):
    def __init__(self, settings: Model, spec: FeatureSpec, preprocessing: Any = None) -> None:
        super().__init__(settings, spec, preprocessing)
        self.dense["pair"].assign(np.random.default_rng().normal(size=2))


def with_tables(tables: dict[str, int], *inputs: Input, first: dict[str, float] | None = None) -> Any:
    """A builder of two towers that also name these."""

    def built(settings: Model, spec: FeatureSpec, preprocessing: Any) -> TwoTower:
        found = TwoTower(settings, spec, preprocessing)
        found.tables, found.inputs = {**found.tables, **tables}, (*found.inputs, *inputs)
        found.initial_ranges = first or {}
        return found

    return built


ITEMS = own_rows("items", "item")
taken = with_tables({"cross": 4}, *own_rows("cross", "item"))
reserved = with_tables({"dense": 4}, *own_rows("dense", "item"))
misnamed = with_tables({"Items": 4}, *own_rows("Items", "item"))
empty = with_tables({"items": 0}, *ITEMS)
broken = with_tables({"items": 1.5}, *ITEMS)  # type: ignore[dict-item]
alone = with_tables({"items": 4})
unsized = with_tables({}, *ITEMS)
not_own = with_tables({}, *own_rows("item", "sequence_items"))
made_up = with_tables({"items": 4}, *ITEMS, Input("items_of_day", "BE", "", "items", "item"))
ranged = with_tables({"items": 4}, *ITEMS, first={"items": -1.0})
strange = with_tables({"items": 4}, *ITEMS, first={"item_rows": 0.1})


def unknown_ids(settings: Model, spec: FeatureSpec, preprocessing: Any) -> None:
    own_rows("items", "sequence_item")


def unknown_input(settings: Model, spec: FeatureSpec, preprocessing: Any) -> None:
    pick("features", "items_row")


def nothing(settings: Model, spec: FeatureSpec, preprocessing: Any) -> None:
    """Builds no ranker."""


def failing(settings: Model, spec: FeatureSpec, preprocessing: Any) -> None:
    raise KeyError("heads")


def refused(name: str, *flags: str) -> str:
    path = f"{__name__}:{name}"
    settings = small_settings("--model.ranker", path, *FLAGS, *flags)
    with pytest.raises(ProgramError) as caught:
        check_ranker(settings, FeatureSpec.from_settings(settings), None)
    assert str(caught.value).startswith((f"model.ranker '{path}'", f"the model of model.ranker '{path}'"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Remembering", "gave two different scores"),
        ("Together", "is another alone than in a batch"),
        ("Lottery", "depend on the seed; dropout is for training only"),
        ("Narrow", "losses gave []"),
        ("Boasting", "engagement_logit is not item_query . item_row + cross + what user and category say: off by"),
        ("Wide", "item_query is [32, 16]; wanted is the shape of item_row"),
        ("Idle", "no loss depends on its weight idle"),
        (
            "Forgetful",
            "its losses depend on the variable pair, which is not in dense: it is never learned, and no version has it; put it",
        ),
        ("Bessel", "it has no tf.BesselI0e"),
        ("Chance", "begins with other values; draw first values from a fixed seed"),
        ("taken", "names a table of its own 'cross', which is taken; give it another name"),
        ("reserved", "names a table of its own 'dense', which is taken; give it another name"),
        ("misnamed", "names a table of its own 'Items'; use lower-case letters, digits and underscores"),
        ("empty", "rows of its table 'items' have the width 0; give them 1 or more"),
        ("broken", "rows of its table 'items' have the width 1.5"),
        ("alone", "no input looks up its table 'items'; add own_rows('items', ...), or take it out of tables"),
        ("unsized", "reads items_of_item without the width of items rows; put it into tables"),
        ("not_own", "looks up 'item' by own_rows; pick the inputs of a table that is not its own"),
        ("made_up", "names the input 'items_of_day'; there are"),
        ("ranged", "initial_ranges says -1.0 of 'items'; give"),
        ("strange", "initial_ranges says 0.1 of 'item_rows'; give"),
        ("unknown_ids", ": own_rows looks up 'items' by 'sequence_item'; there are user, item,"),
        ("unknown_input", ": pick names the input 'items_row'; there are features, user_row,"),
        ("nothing", "returned NoneType; wanted is build(settings, spec, preprocessing)"),
        ("failing", "raised KeyError: 'heads' (test_ranker_checks.py:"),
    ],
)
def test_a_wrong_ranker_is_refused_in_one_line(name: str, said: str) -> None:
    message = refused(name)
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["din", "two_tower"])
def test_sequences_that_rows_do_not_carry_are_refused(name: str) -> None:
    settings = small_settings("--model.ranker", wanted(name), *FLAGS, "--features.sequence", "0")
    with pytest.raises(ProgramError, match=r"reads the user's latest events; say how many with features\.sequence"):
        check_ranker(settings, FeatureSpec.from_settings(settings), None)


class Centred(tf.Module):
    """A preprocessing with a variable that the bootstrap set."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = tf.Variable(1.0, name="mean")

    def __call__(self, x: Any) -> Any:
        return tf.math.log1p(x) - self.mean


def test_a_variable_of_the_preprocessing_is_no_weight() -> None:
    settings = small_settings("--model.ranker", wanted("two_tower"), *FLAGS)
    assert "lowers to LiteRT" in check_ranker(settings, FeatureSpec.from_settings(settings), Centred())


def test_an_option_reaches_the_ranker_in_the_type_of_its_default() -> None:
    settings = small_settings("--model.options", "temperature=0.5")
    ranker = TwoTower(settings.model, dataclasses.replace(FeatureSpec(), sequence=3))
    assert ranker.temperature == 0.5
    with pytest.raises(SettingsError, match=r"model.options temperature=warm is no float, as its default 0\.1 is"):
        TwoTower(Model(options=("temperature=warm",)), FeatureSpec())


@pytest.mark.parametrize("name", ["din", "two_tower"])
def test_the_examples_pass_their_checks_and_learn_what_comes_next(name: str) -> None:
    settings = load(["--config", str(EXAMPLES / name / "springtide.toml"), "--trainer.device", "cpu"], env={})
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, dim=8, hidden=(8,), popular=4))
    spec = FeatureSpec.from_settings(settings)
    assert "lowers to LiteRT" in check_ranker(settings, spec, None)
    trainer = Trainer(settings, spec)
    assert trainer.engine.name == engine_name(trainer.settings, trainer.model, trainer.device) == "tensorflow"
    made = micro_batch(96)
    drawn = np.random.default_rng(5)
    events = {key: drawn.integers(1, 5, (96, spec.sequence)).astype(kind) for key, kind in SEQUENCES.items()}
    batch = dataclasses.replace(made, **events)
    losses = [trainer.step(batch).interest_log_loss for _ in range(30)]
    assert np.isfinite(losses).all()
    # The candidates of the first steps are other ones: popular categories are not known yet.
    assert losses[-1] < losses[3]
