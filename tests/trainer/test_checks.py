"""The checks of a tower or ranker of one's own."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from deploy.examples.two_tower.ranker import TwoTower
from state.config.loading import load
from state.config.sections import Model
from state.config.sections import Model as ModelSettings
from state.errors import ProgramError, SettingsError
from state.features.spec import FeatureSpec
from state.microbatch.batch import SEQUENCES
from state.process.part import OPTIONS_READ
from tests.trainer.batches import micro_batch
from tests.trainer.clicks import SPEC, batches, small_settings
from tests.trainer.logs import fresh, write_transform
from trainer import loop
from trainer.checks import check_model
from trainer.engine.graphs import engine_name
from trainer.engine.step import Trainer
from trainer.model.inputs import Input, own_rows, pick
from trainer.model_checks import check_own
from trainer.versions.lowering import build as build_program

EXAMPLE = "deploy.examples.own_model.tower:build"

Call = Callable[[Any, Any, bool, Any], Any]


class Tower(tf.Module):
    """One matrix, and what a test makes of it."""

    def __init__(self, width_in: int, settings: ModelSettings, call: Call) -> None:
        super().__init__()
        drawn = np.random.default_rng(7).normal(0, 0.1, (width_in, settings.hidden[-1])).astype(np.float32)
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
        r"gave shape \[32, 3\] and type float32 for 32 rows; wanted is \[B, 8\]",
    ),
    "double": (
        lambda t, x, *_: tf.cast(x @ t.kernel, tf.float64),
        r"type float64 for 32 rows; wanted is \[B, 8\] float32",
    ),
    "random": (
        lambda t, x, *_: x @ t.kernel + tf.random.normal([]),
        r"draw from the seed with tf\.random\.stateless_\*",
    ),
    "counting": (counting, "changed a variable while it was called"),
    "misspelt": (
        lambda t, x, *_: x @ t.kernle,
        r"called with x \[32, 152\] and training=False it raised AttributeError.*\(test_checks\.py:\d+\); wanted",
    ),
    "infinite": (lambda t, x, *_: tf.math.log(x @ t.kernel * 0.0), "is not finite for some rows"),
}


def builder(name: str) -> Callable[[int, ModelSettings], Tower]:
    return lambda width, settings: Tower(width, settings, CALLS[name][0])


for _name in CALLS:
    globals()[f"build_{_name}"] = builder(_name)


def build_nothing(width: int, settings: ModelSettings) -> None:
    return None


def build_of_width(width: int) -> None:
    return None


def build_namesakes(width: int, settings: ModelSettings) -> Tower:
    tower = Tower(width, settings, lambda t, x, *_: x @ t.kernel)
    tower.other = tf.Variable(tf.zeros([3]), name="kernel")
    return tower


REFUSED = {f"build_{name}": message for name, (_, message) in CALLS.items()} | {
    "build_nothing": r"returned NoneType; wanted is build\(width_in: int, settings\) -> tf\.Module",
    "build_of_width": r"raised TypeError.*wanted is build\(width_in: int, settings\)",
}


def check(name: str) -> str:
    return check_own(small_settings("--model.tower", name), SPEC)


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_tower_is_refused_with_what_is_expected(name: str) -> None:
    with pytest.raises(ProgramError, match=REFUSED[name]) as caught:
        check(f"{__name__}:{name}")
    assert str(caught.value).startswith((f"model.tower '{__name__}:{name}'", "the model of model.tower"))
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


def test_the_example_passes_and_its_weights_are_listed() -> None:
    said = check(EXAMPLE)
    assert "[B, 152] to [B, 8]" in said and "cross_in [152, 32]" in said and "lowers to LiteRT" in said


def test_an_option_that_neither_ranker_nor_preprocessing_reads_is_refused(tmp_path: Path) -> None:
    """Only once the model passed all other checks, in which a variable of the preprocessing is no weight."""
    write_transform(tmp_path)
    # What the check of the preprocessing leaves next to its graph.
    (tmp_path / "transform" / OPTIONS_READ).write_text('["steps"]')
    flags = ["--model.ranker", wanted("two_tower"), "--features.sequence", "3", "--model.hidden", "8"]
    flags += ["--model.options", "temperature=0.5,steps=3,heads=3", "--paths.state", str(tmp_path / "state")]
    settings = small_settings(*flags)
    with pytest.raises(
        SettingsError, match=r"heads=3: neither .* the names read are steps, temperature; correct the name"
    ):
        check_model(settings, FeatureSpec.from_settings(settings), tmp_path / "transform")


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
    build_program(trainer.ranker())


def test_the_trainer_refuses_it_before_any_wait(tmp_path: Path) -> None:
    settings = small_settings(
        "--model.tower", f"{__name__}:build_nothing", "--trainer.metrics_port", "0", "--paths.state", str(tmp_path)
    )
    with pytest.raises(ProgramError, match=REFUSED["build_nothing"]):
        loop.run(settings, [], threading.Event())
    assert not list((settings.registry_dir / "control").iterdir())


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
        self.dense = {**self.dense, "idle": tf.Variable([0.0], name="idle")}


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
broken = with_tables({"items": 1.5}, *ITEMS)  # type: ignore[dict-item]  # a width that is no whole number, as a ranker may give
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
        check_own(settings, FeatureSpec.from_settings(settings))
    assert str(caught.value).startswith((f"model.ranker '{path}'", f"the model of model.ranker '{path}'"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Remembering", "gave two different scores"),
        ("Together", "is another alone than in a batch"),
        ("Lottery", "depend on the seed; dropout is for training only"),
        ("Narrow", "losses gave []"),
        ("Boasting", "engagement_logit is not item_query . item_row + cross + the terms of user and category: off by"),
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
        ("alone", "no input looks up its table 'items'; add own_rows('items', ...), or remove it from tables"),
        ("unsized", "reads items_of_item without the width of items rows; add it to tables"),
        ("not_own", "looks up 'item' by own_rows; pick the inputs of a table that is not its own"),
        ("made_up", "names the input 'items_of_day'; there are"),
        ("ranged", "initial_ranges has -1.0 for 'items'; use"),
        ("strange", "initial_ranges has 0.1 for 'item_rows'; use"),
        ("unknown_ids", ": own_rows looks up 'items' by 'sequence_item'; there are user, item,"),
        ("unknown_input", ": pick names the input 'items_row'; there are features, user_row,"),
        ("nothing", "returned NoneType; wanted is build(settings, spec, preprocessing)"),
        ("failing", "raised KeyError: 'heads' (test_checks.py:"),
    ],
)
def test_a_wrong_ranker_is_refused_in_one_line(name: str, said: str) -> None:
    message = refused(name)
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["din", "two_tower"])
def test_sequences_that_rows_do_not_carry_are_refused(name: str) -> None:
    settings = small_settings("--model.ranker", wanted(name), *FLAGS, "--features.sequence", "0")
    with pytest.raises(ProgramError, match=r"reads the user's latest events; set their number in features\.sequence"):
        check_own(settings, FeatureSpec.from_settings(settings))


def test_an_option_reaches_the_ranker_in_the_type_of_its_default() -> None:
    settings = small_settings("--model.options", "temperature=0.5")
    ranker = TwoTower(settings.model, dataclasses.replace(FeatureSpec(), sequence=3))
    assert ranker.temperature == 0.5
    with pytest.raises(SettingsError, match=r"model.options temperature=warm is no float, as its default 0\.1 is"):
        TwoTower(Model(options=("temperature=warm",)), FeatureSpec())


def test_an_example_learns_what_comes_next() -> None:
    """The others: `tests/conformance/test_engines.py`."""
    settings = load(["--config", str(EXAMPLES / "two_tower" / "springtide.toml"), "--trainer.device", "cpu"], env={})
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, dim=8, hidden=(8,), popular=4))
    spec = FeatureSpec.from_settings(settings)
    trainer = Trainer(settings, spec)
    assert trainer.engine.name == engine_name(trainer.settings, trainer.ranker(), trainer.device) == "tensorflow"
    made = micro_batch(96)
    drawn = np.random.default_rng(5)
    events: dict[str, Any] = {
        key: drawn.integers(1, 5, (96, spec.sequence)).astype(kind) for key, kind in SEQUENCES.items()
    }
    batch = dataclasses.replace(made, **events)
    losses = [trainer.step(batch).interest_log_loss for _ in range(30)]
    assert np.isfinite(losses).all()
    # The candidates of the first steps are other ones: popular categories are not known yet.
    assert losses[-1] < losses[3]
