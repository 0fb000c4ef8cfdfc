"""The correction of interests is the formula of its module's docstring."""

from __future__ import annotations

import numpy as np

from state.compiled import compiled
from state.features.arrays import NEVER
from state.features.spec import FeatureSpec
from state.ranking.interest_scores import (
    COLUMNS,
    FEATURES,
    LIVES_USED,
    MASKED,
    READ,
    Columns,
    Workspace,
    correct,
    first_weights,
)
from state.ranking.item_lists import HALF_LIVES_S, ItemLists, count_click

IDS = np.array([[5, 9, 0, 7, 5, 11]], np.uint64)
"""Three slots of the user's own categories, and three others; the second 5 is masked."""
LOGITS = np.array([[1.0, -0.5, MASKED, 0.25, MASKED, 2.0]], np.float32)
EVERYTHING, ROWS = np.array([1, 2, 0, 0, 0, 0, 0, 0], np.int32), np.array([[3, 4]], np.int32)
AT_S = 100_000


@compiled("i8, u8[::1], i8[::1], ItemLists")
def count_clicks(row: int, categories: np.ndarray, at_s: np.ndarray, lists: ItemLists) -> None:
    for k in range(categories.shape[0]):
        count_click(row, categories[k], at_s[k], lists)


def lists() -> ItemLists:
    made = ItemLists.empty(5, 16)
    for row, categories in ((1, [5, 5, 7]), (2, [11, 12]), (3, [7, 9, 9]), (4, [11])):
        at_s = AT_S - 9_000 + 2_000 * np.arange(len(categories))
        count_clicks(row, np.array(categories, np.uint64), at_s, made)
    return made


def corrected(weights: np.ndarray, phi: np.ndarray) -> np.ndarray:
    logits: np.ndarray = LOGITS.copy()
    correct(lists(), EVERYTHING, ROWS, np.array([AT_S]), IDS, logits, weights, phi, Workspace.empty(6, 3))
    first: np.ndarray = logits[0]
    return first


def test_the_time_since_the_last_event_of_any_action_is_a_column_of_phi() -> None:
    spec = FeatureSpec()
    vectors = spec.empty(3)
    recency = [spec.names.index(f"{action}.recency") for action in spec.actions]
    vectors.features[:, recency] = NEVER
    vectors.features[1, recency[:2]] = 86, 131
    vectors.features[2, recency[-1]] = 0
    phi = Columns(spec).phi(vectors.features, vectors.category_windows)
    np.testing.assert_allclose(phi[:, 1], [NEVER / 128, 86 / 128, 0.0])


def test_the_first_weights_change_nothing() -> None:
    phi = np.ones((1, COLUMNS), np.float32)
    assert corrected(first_weights(), phi).tolist() == LOGITS[0].tolist()


def test_logits_are_those_of_the_formula() -> None:
    made, phi = lists(), np.array([[1.0, 0.0, 1.0, 1.0]], np.float32)
    weights = np.random.default_rng(3).normal(0, 0.5, (FEATURES, COLUMNS))
    features = np.zeros((FEATURES, 6))
    there = LOGITS[0] > MASKED / 2
    features[0] = np.where(there, LOGITS[0], 0.0)
    for number, life in enumerate(LIVES_USED):
        kept = 2.0 ** (-(AT_S - made.at_s) / HALF_LIVES_S[life])
        for source, rows in enumerate(([1, 2], [3], [4])):
            total = sum(made.totals[row, life] * kept[row] for row in rows)
            for row in rows:
                for category, count in zip(made.ids[row], made.counts[row, life] * kept[row], strict=True):
                    of_it = there & (IDS[0] == category) & (category != 0)
                    features[1 + 2 * source + number, of_it] = np.log1p(1000 * count / (total + 0.5))
    features[7:, 0] = 1.0, 0.0, 1.0, 0.0
    features[7:, 1] = 0.0, 1.0, 1.0, np.log(2) / 3
    wanted = np.where(there, (weights @ phi[0]) @ features, MASKED)
    np.testing.assert_allclose(corrected(weights, phi), wanted, rtol=1e-5, atol=1e-5)
    assert ROWS.shape[1] == READ
