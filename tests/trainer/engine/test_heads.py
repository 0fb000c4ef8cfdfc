"""The compiled heads against TensorFlow: the scores of `Model.forward`, and its derivatives."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from state.config.sections import Model as ModelSettings
from state.ranking.transitions import COLUMNS, SUCCESSORS
from tests.trainer.batches import SPEC
from trainer.engine.facts import MOVING, Facts, Given, Moved, Moving, Scores, Slopes
from trainer.engine.graph import FROM_HEADS
from trainer.engine.heads import MOVE_ROWS, USER_PACE, heads
from trainer.model.network import Model

ROWS, DIM, POPULAR = 35, 8, 4
"""More rows than a block of the heads (16), no multiple of it, and one of seven."""
LABELS, WIDTH = SPEC.recent_categories, len(SPEC.window_names)
CATEGORIES, ITEMS = 12, 9
LAST = LABELS + POPULAR + SUCCESSORS


@pytest.fixture(scope="module")
def model() -> Model:
    made = Model(ModelSettings(dim=DIM, hidden=(16, 8), popular=POPULAR), SPEC)
    drawn = np.random.default_rng(3)
    made.set_weights(
        {name: value + drawn.normal(0, 0.2, value.shape).astype(np.float32) for name, value in made.weights().items()}
    )
    return made


def step(model: Model, labelled: bool = True, rows: int = ROWS) -> tuple[Facts, dict[str, np.ndarray]]:
    """Facts of a step and the arrays that the graph starts from; row 0 of the tables is the missing one."""
    drawn = np.random.default_rng(5)

    def normal(*shape: int) -> np.ndarray:
        return drawn.normal(0, 0.5, shape).astype(np.float32)

    count = drawn.integers(1, LABELS + 1, rows) if labelled else np.zeros(rows, int)
    recent_mask = (np.arange(LABELS) < count[:, None]).astype(np.float32)
    # The labels of a row are distinct, as a history gives them; one of them may have no row.
    recent_at = np.array([drawn.permutation(CATEGORIES + LABELS)[:LABELS] for _ in range(rows)]) % CATEGORIES
    recent_at = np.where(recent_mask > 0, recent_at, 0).astype(np.int32)
    for row in recent_at:
        _, first = np.unique(row, return_index=True)
        row[np.setdiff1d(np.arange(LABELS), first)] = 0
    pair_category_at = np.concatenate([recent_at[:, 0], drawn.integers(0, CATEGORIES, rows)]).astype(np.int32)
    facts = Facts(
        windows=drawn.integers(0, 300, (rows, LABELS, WIDTH + len(COLUMNS))).astype(np.uint16),
        log_scale=model.prepare_windows.log_scale,
        scale=model.prepare_windows.scale,
        shift=model.prepare_windows.shift,
        recent_mask=recent_mask,
        popular_mask=(drawn.random((rows, POPULAR)) < 0.7).astype(np.float32),
        successor_mask=(drawn.random((rows, SUCCESSORS)) < 0.6).astype(np.float32),
        other_mask=np.tile(np.array([1, 0, 1, 1, 0, 1, 1], np.float32), rows // 7),
        popular_next=drawn.integers(0, 30, (rows, POPULAR, len(COLUMNS))).astype(np.uint16),
        successor_next=drawn.integers(0, 30, (rows, SUCCESSORS, len(COLUMNS))).astype(np.uint16),
        recent_at=recent_at,
        successor_at=drawn.integers(1, CATEGORIES, (rows, SUCCESSORS)).astype(np.int32),
        other_at=drawn.integers(1, CATEGORIES, rows).astype(np.int32),
        pair_category_at=pair_category_at,
        pair_item_at=drawn.integers(0, ITEMS, 2 * rows).astype(np.int32),
        target=np.tile(np.array([0, LABELS, LAST, 0, -1, LABELS + POPULAR, 0], np.int32), rows // 7),
        weight=np.tile(np.array([1, 2, 1, 1, 0, 0.5, 3], np.float32), rows // 7),
        engaged=(np.arange(2 * rows) < rows).astype(np.float32),
        engaged_shift=np.full(2 * rows, 0.7, np.float32),
        engaged_weight=np.where(np.arange(2 * rows) % 5 == 4, 0.0, 0.2).astype(np.float32),
        cross_at=np.zeros((rows, 0), np.int32),
        share_at=np.zeros(0, np.int32),
        cross_prior=np.zeros(0, np.float32),
    )
    facts.popular_mask[1::7, 0] = 1.0
    facts.successor_mask[5::7, 0] = 1.0
    if not labelled:
        facts.target[facts.target == 0] = -1
    category, item = normal(CATEGORIES, DIM), normal(ITEMS, DIM)
    category[0], item[0] = 0, 0
    return facts, {
        "scoring": normal(rows, 8),
        "learning": normal(rows, 8),
        "user": normal(rows, DIM),
        "prepared": normal(rows, len(SPEC.names)),
        "popular_rows": normal(POPULAR, DIM),
        "category": category,
        "item": item,
    }


def given(model: Model, arrays: dict[str, tf.Tensor]) -> Given:
    """What the graph computes of these arrays."""
    scoring, learning = (model.queries(arrays[name], arrays["user"]) for name in ("scoring", "learning"))
    found = [scoring, learning, *(model.popular(queries, arrays["popular_rows"]) for queries in (scoring, learning))]
    found += [model.person(arrays["prepared"]), arrays["category"], arrays["item"]]
    dense = {name: model.dense[weight].numpy() for weight, name in FROM_HEADS.items()}
    moving = Moving(*(dense.pop(name) for name in MOVING))
    none = np.zeros((1, 2), np.float32)
    return Given(*(np.array(value) for value in found), **dense, cross=none, cross_precision=none, moving=moving)


def pairs(model: Model, facts: Facts, arrays: dict[str, tf.Tensor], vector: str) -> tuple[tf.Tensor, ...]:
    """The logits of `Model`, of one pass: labels, popular, successors, last slot, and both pairs of each row."""
    queries = model.queries(arrays[vector], arrays["user"])
    inputs = {
        "recent_rows": tf.gather(arrays["category"], facts.recent_at),
        "recent_mask": facts.recent_mask,
        "popular_rows": arrays["popular_rows"],
        "popular_mask": facts.popular_mask,
        "successor_rows": tf.gather(arrays["category"], facts.successor_at),
        "successor_mask": facts.successor_mask,
        "popular_next": facts.popular_next.astype(np.float32),
        "successor_next": facts.successor_next.astype(np.float32),
        "category_windows": facts.windows[:, :, :WIDTH].astype(np.float32),
        "recent_next": facts.windows[:, :, WIDTH:].astype(np.float32),
        "cross": np.zeros(ROWS, np.float32),
    }
    personal = model.personal(arrays["prepared"])
    logits = model.interest(queries, personal, inputs)
    last = tf.reduce_sum(queries[:, :DIM] * tf.gather(arrays["category"], facts.other_at), 1, keepdims=True)
    last = last + model.dense["interest.other"]
    last = tf.where(facts.other_mask[:, None] > 0, last, -1e9)
    frozen = model.queries(arrays["scoring"], arrays["user"])
    read = model.interest(frozen, personal, inputs)
    engaged = []
    for part in (slice(0, ROWS), slice(ROWS, None)):
        chosen = inputs | {
            "item_row": tf.gather(arrays["item"], facts.pair_item_at[part]),
            "category_row": tf.gather(arrays["category"], facts.pair_category_at[part]),
        }
        # The interest head's word on the category is read without dropout.
        mixed = tf.concat([frozen[:, :DIM], queries[:, DIM:]], 1)
        engaged.append(model.engagement(mixed, read, chosen))
    return *logits, last, tf.concat(engaged, 0)


@pytest.mark.parametrize("labelled", [True, False])
def test_scores_are_those_of_the_model(model: Model, labelled: bool) -> None:
    facts, arrays = step(model, labelled)
    scores, _, _ = heads(facts, given(model, arrays))
    recent_logits, popular_logits, successor_logits, last, engaged = pairs(model, facts, arrays, "scoring")
    np.testing.assert_allclose(scores.recent_logits, recent_logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores.popular_logits, popular_logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores.successor_logits, successor_logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores.engagement, engaged, rtol=1e-4, atol=1e-4)
    logits = tf.concat([recent_logits, popular_logits, successor_logits, last], 1).numpy()
    for row in np.flatnonzero(facts.target >= 0):
        expected = (
            np.log(np.exp(logits[row] - logits[row].max()).sum()) + logits[row].max() - logits[row, facts.target[row]]
        )
        assert scores.interest_loss[row] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        before = (logits[row, :-1] > logits[row, facts.target[row]]).sum()
        assert scores.rank[row] == (before if facts.target[row] < LAST else LAST)
    shifted = scores.engagement + facts.engaged_shift
    expected = tf.nn.sigmoid_cross_entropy_with_logits(facts.engaged, shifted)
    np.testing.assert_allclose(scores.engagement_loss, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("labelled", [True, False])
def test_slopes_are_the_derivatives_of_the_model(model: Model, labelled: bool) -> None:
    facts, arrays = step(model, labelled)
    held = {name: tf.Variable(value) for name, value in arrays.items()}
    watched = [model.dense[name] for name in FROM_HEADS]
    with tf.GradientTape() as tape:
        *candidates, engaged = pairs(model, facts, held, "learning")
        logits = tf.concat(candidates, 1)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(np.maximum(facts.target, 0), logits)
        total = tf.reduce_sum(losses * np.where(facts.target >= 0, facts.weight, 0).astype(np.float32))
        engaged_losses = tf.nn.sigmoid_cross_entropy_with_logits(facts.engaged, engaged + facts.engaged_shift)
        total += tf.reduce_sum(engaged_losses * facts.engaged_weight)
    sources = {"category": held["category"], "item": held["item"], "user": held["user"], "vector": held["learning"]}
    sources |= {"popular": held["popular_rows"]}
    expected, expected_dense = tape.gradient(total, (sources, watched))

    _, slopes, _ = heads(facts, given(model, arrays))
    with tf.GradientTape() as tape:
        queries = model.queries(held["learning"], held["user"])
        ours = [queries, model.popular(queries, held["popular_rows"])]
    outputs = [slopes.learning, slopes.learning_popular]
    del sources["category"], sources["item"]
    found = {name: np.array(value) for name, value in tape.gradient(ours, sources, output_gradients=outputs).items()}
    found |= {"category": slopes.category, "item": slopes.item}
    for name, value in found.items():
        np.testing.assert_allclose(
            value[1:], tf.convert_to_tensor(expected[name])[1:], rtol=2e-3, atol=2e-5, err_msg=name
        )
    for weight, slope in zip(FROM_HEADS, expected_dense, strict=True):
        name = FROM_HEADS[weight]
        ours_slope = getattr(slopes.moving if name in MOVING else slopes, name)
        reference = np.zeros_like(ours_slope) if slope is None else slope.numpy()
        np.testing.assert_allclose(ours_slope, reference, rtol=2e-3, atol=2e-5, err_msg=weight)


def part(facts: Facts, of: Given, rows: slice, moved: Moving) -> tuple[Facts, Given]:
    """Some rows of a step, with weights that have moved since."""
    count = facts.target.size
    both = np.r_[np.arange(count)[rows], count + np.arange(count)[rows]]
    pairs = {name: value[both] for name, value in facts._asdict().items() if len(value) == 2 * count}
    single = {name: value[rows] for name, value in facts._asdict().items() if len(value) == count}
    per_row = {name: value[rows] for name, value in of._asdict().items() if len(value) == count}
    return facts._replace(**single, **pairs), of._replace(**per_row, moving=moved)


def test_weights_of_the_evidence_move_after_each_32_rows_to_their_mean_and_later_rows_see_it(model: Model) -> None:
    count, rate = 3 * MOVE_ROWS + 9, np.float32(0.02)
    facts, arrays = step(model, rows=count)
    of = given(model, arrays)
    slots = Moved.of(of.moving.flat())
    scores, slopes, learned = heads(facts, of, slots, rate)
    moved = learned.moved

    pace = np.where(np.arange(slots.weights.size) < of.moving.user.size, USER_PACE, 1.0)
    weights, fast, slow, second = (value.astype(np.float64) for value in slots[:4])
    total, expected_scores = np.zeros_like(weights), []
    for number, begin in enumerate(range(0, count, MOVE_ROWS), start=1):
        rows = slice(begin, min(begin + MOVE_ROWS, count))
        some, then, _ = heads(*part(facts, of, rows, Moving.of(weights.astype(np.float32), of.moving)))
        expected_scores.append(some.recent_logits)
        slope = then.moving.flat()
        total += slope
        second = 0.999 * second + 0.001 * slope**2
        fast = fast - rate * pace * np.sqrt(1 - 0.999**number) * slope / (np.sqrt(second) + 1e-7)
        slow = slow + max(1 / 200, 10 / (number + 10)) * (fast - slow)
        weights = 0.3 * fast + 0.7 * slow
    np.testing.assert_allclose(scores.recent_logits, np.concatenate(expected_scores), rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(moved.weights, weights, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(moved.slow, slow, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(
        np.concatenate([each.reshape(-1) for each in slopes.moving]), total, rtol=2e-3, atol=1e-3
    )
    assert np.abs(moved.weights - slots.weights).max() > rate / 2
    still = heads(facts, of)
    assert (still[2].moved.weights == slots.weights).all()
    assert (still[0].recent_logits[:MOVE_ROWS] == scores.recent_logits[:MOVE_ROWS]).all()


def test_one_pass_without_dropout_is_two_passes_over_the_same(model: Model) -> None:
    facts, arrays = step(model)
    of = given(model, arrays | {"learning": arrays["scoring"]})
    _, slopes, _ = heads(facts, of, apart=False)
    _, twice, _ = heads(facts, of)
    for name in ("learning", "learning_popular", "category", "item"):
        np.testing.assert_array_equal(getattr(slopes, name), getattr(twice, name), err_msg=name)


def test_every_field_of_the_slopes_is_a_field_of_what_was_given() -> None:
    assert (
        set(Slopes._fields) < set(Given._fields) and Slopes.__annotations__["moving"] == Given.__annotations__["moving"]
    )
    assert len(Scores._fields) == 7
