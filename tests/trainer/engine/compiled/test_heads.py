"""The compiled heads against the ranker in TensorFlow: its scores, and the derivatives of its losses."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from state.config.sections import Model as ModelSettings
from state.ranking.transitions import COLUMNS, SUCCESSORS
from tests.trainer.batches import SPEC
from trainer.engine.compiled.arrays import FAST, FROM_HEADS, Facts, FastWeights, Gradients, HeadInputs, read_only
from trainer.engine.compiled.heads import FAST_ROWS, Heads
from trainer.engine.compiled.threads import Threads
from trainer.engine.engine import Scores
from trainer.engine.optimizers.fast_weights import USER_LR_SCALE, FastSlots
from trainer.model import losses
from trainer.model.default_ranker import DefaultRanker, Encoded
from trainer.model.ranker import Targets

ROWS, DIM, POPULAR = 35, 8, 4
"""More rows than a block of the heads (16), no multiple of it, and one of seven."""
LABELS, WIDTH = SPEC.recent_categories, len(SPEC.window_names)
CATEGORIES, ITEMS = 12, 9
LAST = LABELS + POPULAR + SUCCESSORS


@pytest.fixture(scope="module")
def ranker() -> DefaultRanker:
    made = DefaultRanker(ModelSettings(dim=DIM, hidden=(16, 8), popular=POPULAR), SPEC)
    drawn = np.random.default_rng(3)
    made.set_weights(
        {name: value + drawn.normal(0, 0.2, value.shape).astype(np.float32) for name, value in made.weights().items()}
    )
    return made


def step(ranker: DefaultRanker, labelled: bool = True, rows: int = ROWS) -> tuple[Facts, dict[str, np.ndarray]]:
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
    windows = drawn.integers(0, 300, (rows, LABELS, WIDTH + len(COLUMNS))).astype(np.uint16)
    facts = Facts(
        windows=read_only(windows[..., :WIDTH]),
        recent_next=windows[..., WIDTH:].copy(),
        log_scale=ranker.window_scaling.log_scale,
        scale=ranker.window_scaling.scale,
        shift=ranker.window_scaling.shift,
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
        "plain_queries": normal(rows, 2 * DIM + 1),
        "queries": normal(rows, 2 * DIM + 1),
        "user_features": normal(rows, ranker.user_width),
        "popular_rows": normal(POPULAR, DIM),
        "category": category,
        "item": item,
    }


def given(ranker: DefaultRanker, arrays: dict[str, tf.Tensor]) -> HeadInputs:
    """What the graph computes of these arrays."""
    queries = [arrays["plain_queries"], arrays["queries"]]
    found = [*queries, *(ranker.popular_logits(each, arrays["popular_rows"]) for each in queries)]
    found += [arrays["user_features"], arrays["category"], arrays["item"]]
    dense = {name: ranker.dense[weight].numpy() for weight, name in FROM_HEADS.items()}
    moving = FastWeights(*(dense.pop(name) for name in FAST))
    none = np.zeros((1, 2), np.float32)
    return HeadInputs(*(np.array(value) for value in found), **dense, cross=none, cross_precision=none, fast=moving)


def inputs_of(facts: Facts, arrays: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """The ranker's inputs of learning, but for those that only `encode` reads."""
    rows = len(facts.target)
    category, item = (tf.convert_to_tensor(arrays[name]) for name in ("category", "item"))
    categories, items = facts.pair_category_at, facts.pair_item_at
    return {
        "recent_rows": tf.gather(category, facts.recent_at),
        "recent_mask": facts.recent_mask,
        "popular_rows": tf.convert_to_tensor(arrays["popular_rows"]),
        "popular_mask": facts.popular_mask,
        "successor_rows": tf.gather(category, facts.successor_at),
        "successor_mask": facts.successor_mask,
        "popular_next": facts.popular_next.astype(np.float32),
        "successor_next": facts.successor_next.astype(np.float32),
        "category_windows": facts.windows.astype(np.float32),
        "recent_next": facts.recent_next.astype(np.float32),
        "cross": np.zeros(rows, np.float32),
        "other_row": tf.gather(category, facts.other_at),
        "other_mask": facts.other_mask,
        "item_row": tf.gather(item, items[:rows]),
        "category_row": tf.gather(category, categories[:rows]),
        "negative_item_row": tf.gather(item, items[rows:]),
        "negative_category_row": tf.gather(category, categories[rows:]),
    }


def encoded_of(arrays: dict[str, tf.Tensor], learning: str) -> Encoded:
    """With dropout (`queries`), or without (`plain_queries`)."""
    plain = tf.convert_to_tensor(arrays["plain_queries"])
    queries = plain if learning == "plain_queries" else tf.convert_to_tensor(arrays[learning])
    return Encoded(queries, plain, tf.convert_to_tensor(arrays["user_features"]), plain)


def targets_of(facts: Facts) -> Targets:
    rows = len(facts.target)
    own, drawn = slice(0, rows), slice(rows, None)
    return Targets(
        facts.target, np.where(facts.target >= 0, facts.weight, np.float32(0)), facts.engaged[own],
        facts.engaged_shift[own], facts.engaged_weight[own], facts.engaged_shift[drawn], facts.engaged_weight[drawn],
    )  # fmt: skip


@pytest.mark.parametrize("labelled", [True, False])
def test_scores_are_those_of_the_ranker(ranker: DefaultRanker, labelled: bool) -> None:
    facts, arrays = step(ranker, labelled)
    scores, _, _ = Heads(Threads(1))(facts, given(ranker, arrays))
    expected = ranker.score(encoded_of(arrays, "plain_queries"), inputs_of(facts, arrays))
    for name in ("recent_logits", "popular_logits", "successor_logits"):
        np.testing.assert_allclose(getattr(scores, name), expected[name], rtol=1e-4, atol=1e-5)
    engaged = tf.concat([expected["engagement_logit"], expected["negative_logit"]], 0)
    np.testing.assert_allclose(scores.engagement, engaged, rtol=1e-4, atol=1e-4)
    interest = losses.interest_loss(expected, facts.target)
    np.testing.assert_allclose(scores.interest_loss, interest, rtol=1e-4, atol=1e-5)
    logits = losses.interest_logits(expected).numpy()
    for row in np.flatnonzero(facts.target >= 0):
        before = (logits[row, :-1] > logits[row, facts.target[row]]).sum()
        assert scores.rank[row] == (before if facts.target[row] < LAST else LAST)
    both = tf.concat(losses.engagement_losses(expected, targets_of(facts)), 0)
    own = slice(0, len(facts.target))
    np.testing.assert_allclose(scores.engagement_loss[own], both[own], rtol=1e-4, atol=1e-6)
    assert (facts.engaged[len(facts.target) :] == 0).all()
    np.testing.assert_allclose(scores.engagement_loss, both, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("labelled", [True, False])
def test_gradients_are_the_derivatives_of_the_rankers_losses(ranker: DefaultRanker, labelled: bool) -> None:
    facts, arrays = step(ranker, labelled)
    held = {name: tf.Variable(value) for name, value in arrays.items()}
    watched = [ranker.dense[name] for name in FROM_HEADS]
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(ranker.losses(encoded_of(held, "queries"), inputs_of(facts, held), targets_of(facts)))
    names = ("category", "item", "queries", "popular_rows")
    expected, expected_dense = tape.gradient(total, ({name: held[name] for name in names}, watched))

    _, gradients, _ = Heads(Threads(1))(facts, given(ranker, arrays))
    sources = {name: held[name] for name in ("queries", "popular_rows")}
    with tf.GradientTape() as tape:
        queries = tf.identity(held["queries"])
        ours = [queries, ranker.popular_logits(queries, held["popular_rows"])]
    outputs = [gradients.queries, gradients.popular_logits]
    found = {name: np.array(value) for name, value in tape.gradient(ours, sources, output_gradients=outputs).items()}
    found |= {"category": gradients.category, "item": gradients.item}
    for name, value in found.items():
        np.testing.assert_allclose(
            value[1:], tf.convert_to_tensor(expected[name])[1:], rtol=2e-3, atol=2e-5, err_msg=name
        )
    for weight, slope in zip(FROM_HEADS, expected_dense, strict=True):
        name = FROM_HEADS[weight]
        ours_slope = getattr(gradients.fast if name in FAST else gradients, name)
        reference = np.zeros_like(ours_slope) if slope is None else slope.numpy()
        np.testing.assert_allclose(ours_slope, reference, rtol=2e-3, atol=2e-5, err_msg=weight)


def part(facts: Facts, of: HeadInputs, rows: slice, moved: FastWeights) -> tuple[Facts, HeadInputs]:
    """Some rows of a step, with weights that have moved since."""
    count = facts.target.size
    both = np.r_[np.arange(count)[rows], count + np.arange(count)[rows]]
    pairs = {name: value[both] for name, value in facts._asdict().items() if len(value) == 2 * count}
    single = {name: value[rows] for name, value in facts._asdict().items() if len(value) == count}
    per_row = {name: value[rows] for name, value in of._asdict().items() if len(value) == count}
    return facts._replace(**single, **pairs), of._replace(**per_row, fast=moved)


def test_fast_weights_move_after_each_32_rows_to_their_mean_and_later_rows_see_it(
    ranker: DefaultRanker,
) -> None:
    count, rate = 3 * FAST_ROWS + 9, np.float32(0.02)
    facts, arrays = step(ranker, rows=count)
    of = given(ranker, arrays)
    slots = FastSlots.of(of.fast.flat())
    scores, gradients, learned = Heads(Threads(1))(facts, of, slots, rate)
    moved = learned.fast

    scaled = np.where(np.arange(slots.weights.size) < of.fast.user.size, USER_LR_SCALE, 1.0)
    weights, fast, slow, second = (value.astype(np.float64) for value in slots[:4])
    total, expected_scores = np.zeros_like(weights), []
    for number, begin in enumerate(range(0, count, FAST_ROWS), start=1):
        rows = slice(begin, min(begin + FAST_ROWS, count))
        some, then, _ = Heads(Threads(1))(*part(facts, of, rows, FastWeights.of(weights.astype(np.float32), of.fast)))
        expected_scores.append(some.recent_logits)
        slope = then.fast.flat()
        total += slope
        second = 0.999 * second + 0.001 * slope**2
        fast = fast - rate * scaled * np.sqrt(1 - 0.999**number) * slope / (np.sqrt(second) + 1e-7)
        slow = slow + max(1 / 200, 10 / (number + 10)) * (fast - slow)
        weights = 0.3 * fast + 0.7 * slow
    np.testing.assert_allclose(scores.recent_logits, np.concatenate(expected_scores), rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(moved.weights, weights, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(moved.slow, slow, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(
        np.concatenate([each.reshape(-1) for each in gradients.fast]), total, rtol=2e-3, atol=1e-3
    )
    assert np.abs(moved.weights - slots.weights).max() > rate / 2
    still = Heads(Threads(1))(facts, of)
    assert (still[2].fast.weights == slots.weights).all()
    assert (still[0].recent_logits[:FAST_ROWS] == scores.recent_logits[:FAST_ROWS]).all()


def test_one_pass_without_dropout_is_two_passes_over_the_same(ranker: DefaultRanker) -> None:
    facts, arrays = step(ranker)
    of = given(ranker, arrays | {"queries": arrays["plain_queries"]})
    _, gradients, _ = Heads(Threads(1))(facts, of, apart=False)
    _, twice, _ = Heads(Threads(1))(facts, of)
    for name in ("queries", "popular_logits", "category", "item"):
        np.testing.assert_array_equal(getattr(gradients, name), getattr(twice, name), err_msg=name)


def test_every_field_of_the_gradients_is_a_field_of_what_was_given() -> None:
    assert (
        set(Gradients._fields) < set(HeadInputs._fields)
        and Gradients.__annotations__["fast"] == HeadInputs.__annotations__["fast"]
    )
    assert len(Scores._fields) == 7
