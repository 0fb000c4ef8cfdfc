"""The default ranker: pure over its inputs, open to other towers, lowered with built-in operations only."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from state.config.settings import Settings
from state.errors import SettingsError
from state.ranking.transitions import SUCCESSORS
from state.registry.model_fit import FORMER_TOWERS
from tests.trainer.batches import SPEC
from trainer.model.default_model import DefaultModel, recency_prior
from trainer.model.default_ranker import DefaultRanker
from trainer.model.inputs import INPUTS, sizes
from trainer.model.inputs import shapes as shapes_of
from trainer.model.ranker import MASKED
from trainer.model.tower import DenseTower, build, dropped, load_builder

MODEL = Settings().model
ROWS = 5
TABLES = ("user", "item", "category", "context")


def shapes(rows: int) -> dict[str, list[int]]:
    """Of the inputs of serving, by the table of inputs."""
    found = shapes_of(INPUTS, sizes(MODEL, SPEC), dict.fromkeys(TABLES, MODEL.dim))
    return {name: [rows if size is None else size for size in shape] for name, shape in found.items()}


def inputs(rows: int = ROWS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    found = {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes(rows).items()}
    for name in ("features", "category_windows", "recent_next", "popular_next", "successor_next"):
        found[name] = rng.integers(0, 200, shapes(rows)[name]).astype(np.float32)
    for name in ("recent_mask", "popular_mask", "successor_mask"):
        found[name] = (rng.random(shapes(rows)[name]) < 0.7).astype(np.float32)
    return found


@pytest.fixture(scope="module")
def model() -> DefaultRanker:
    trained = DefaultRanker(MODEL, SPEC)
    rng = np.random.default_rng(2)
    trained.set_weights(
        {name: value + rng.normal(0, 0.1, value.shape).astype(np.float32) for name, value in trained.weights().items()}
    )
    return trained


@pytest.mark.parametrize("labelled", [False, True])
def test_the_model_without_a_graph_begins_with_the_weights_of_the_ranker_in_their_order(labelled: bool) -> None:
    ranker = DefaultRanker(MODEL, SPEC, labelled=labelled)
    host = DefaultModel(MODEL, SPEC, len(SPEC.names), labelled)
    assert list(host.dense) == list(ranker.dense)
    for name, weight in host.weights().items():
        np.testing.assert_array_equal(weight, ranker.dense[name].numpy())
    for name in ("tables", "inputs", "sizes", "initial_ranges", "learning_rates", "fast_weights", "user_width"):
        assert getattr(host, name) == getattr(ranker, name), name
    assert host.shapes(training=True) == ranker.shapes(training=True)


def test_shapes_and_masks(model: DefaultRanker) -> None:
    given = inputs()
    found = model.predict(given)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "recent_logits": (ROWS, SPEC.recent_categories),
        "popular_logits": (ROWS, MODEL.popular),
        "successor_logits": (ROWS, SUCCESSORS),
        "engagement_logit": (ROWS,),
        "vector": (ROWS, MODEL.hidden[-1]),
        "item_query": (ROWS, MODEL.dim),
    }
    assert (found["recent_logits"].numpy()[given["recent_mask"] == 0] == MASKED).all()
    assert (found["popular_logits"].numpy()[given["popular_mask"] == 0] == MASKED).all()
    assert (found["successor_logits"].numpy()[given["successor_mask"] == 0] == MASKED).all()


def test_engagement_is_the_item_query_with_the_item_plus_what_user_category_and_cross_say(model: DefaultRanker) -> None:
    given = inputs()
    nothing = given | {name: np.zeros_like(given[name]) for name in ("item_row", "cross")}
    found, without = model.predict(given), model.predict(nothing)["engagement_logit"].numpy()
    products = (found["item_query"].numpy() * given["item_row"]).sum(1)
    assert np.abs(products).min() > 1e-3
    np.testing.assert_allclose(found["engagement_logit"], without + products + given["cross"], rtol=1e-5, atol=1e-5)


def test_first_weights_are_the_same_in_every_process_and_rank_the_latest_label_first() -> None:
    one, other = DefaultRanker(MODEL, SPEC), DefaultRanker(MODEL, SPEC)
    assert all((value == other.weights()[name]).all() for name, value in one.weights().items())
    given = inputs(1)
    given["category_windows"][:] = 1
    given["recent_rows"][:] = 0
    given["category_windows"][0, :, SPEC.window_names.index("is_last")] = np.arange(SPEC.recent_categories) == 0
    given["recent_mask"][:] = 1
    assert int(one.predict(given)["recent_logits"].numpy().argmax()) == 0
    assert recency_prior(SPEC.window_names).shape == (len(SPEC.window_names),)


def test_weights_of_another_model_are_refused(model: DefaultRanker) -> None:
    weights = model.weights()
    with pytest.raises(SettingsError, match=r"query\.bias.*put the \[model\] settings back"):
        model.set_weights({name: value for name, value in weights.items() if name != "query.bias"})
    with pytest.raises(SettingsError, match=r"tower\.kernel_0"):
        model.set_weights(weights | {"tower.kernel_0": np.zeros((3, 3), np.float32)})


def test_dropout_repeats_with_its_seed_and_keeps_the_expected_share() -> None:
    tower = DenseTower(8, (4096, 4), 0.3)
    x = tf.ones([1, 8])
    one, two = (tower(x, True, tf.constant(seed)).numpy() for seed in ([1, 2], [1, 3]))
    assert (one == tower(x, True, tf.constant([1, 2])).numpy()).all() and (one != two).any()
    kept = dropped(tf.ones([64, 1024]), 0.3, tf.constant([3, 4])).numpy()
    assert abs((kept > 0).mean() - 0.7) < 0.01 and abs(kept.mean() - 1) < 0.01


def test_earlier_names_of_the_default_tower_still_mean_it() -> None:
    assert [load_builder(path) for path in FORMER_TOWERS] == [build] * len(FORMER_TOWERS)
