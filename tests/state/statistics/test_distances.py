"""Distances are what their formulas say, computed here once more by hand, and what TensorFlow Data Validation makes of histograms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from state.statistics.anomalies import aligned, jensen_shannon, l_infinity

COUNTS = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 1000), min_size=1)
PAIRS = st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=1, max_size=20).filter(
    lambda pairs: any(one for one, _ in pairs) and any(other for _, other in pairs)
)


@settings(max_examples=30, deadline=None)
@given(COUNTS, COUNTS)
def test_l_infinity_is_the_largest_difference_of_shares(one: dict[str, int], other: dict[str, int]) -> None:
    shares = [{key: value / sum(counts.values()) for key, value in counts.items()} for counts in (one, other)]
    differences = {key: abs(shares[0].get(key, 0) - shares[1].get(key, 0)) for key in {*one, *other}}
    found = l_infinity(one, other)
    assert found.distance == pytest.approx(max(differences.values()))
    assert differences[found.value] == pytest.approx(found.distance)
    assert l_infinity(other, one) == found
    assert l_infinity(one, {key: 3 * value for key, value in one.items()}).distance == pytest.approx(0)


@settings(max_examples=30, deadline=None)
@given(PAIRS)
def test_jensen_shannon_is_what_entropies_say(pairs: list[tuple[int, int]]) -> None:
    """JSD(P, Q) = H((P + Q) / 2) - (H(P) + H(Q)) / 2, another form of it (Lin, 1991, equation 5.1)."""
    p, q = ([value / sum(values) for value in values] for values in zip(*pairs, strict=True))

    def entropy(shares: list[float]) -> float:
        return -sum(share * math.log2(share) for share in shares if share)

    expected = entropy([(a + b) / 2 for a, b in zip(p, q, strict=True)]) - (entropy(p) + entropy(q)) / 2
    found = jensen_shannon(*np.array(pairs, np.float64).T)
    assert found == pytest.approx(expected, abs=1e-9)
    assert 0 <= found <= 1
    assert jensen_shannon(*np.array(pairs, np.float64).T[::-1]) == pytest.approx(found, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(PAIRS)
def test_a_divergence_of_nothing_in_common_is_one(pairs: list[tuple[int, int]]) -> None:
    one, other = np.array(pairs, np.float64).T
    nothing = np.zeros(len(pairs))
    apart = jensen_shannon(np.concatenate([one, nothing]), np.concatenate([nothing, other]))
    assert apart == pytest.approx(1)


def test_no_values_have_no_distance() -> None:
    with pytest.raises(ValueError, match="no values"):
        l_infinity({}, {"a": 1})
    with pytest.raises(ValueError, match="no values"):
        jensen_shannon(np.zeros(2), np.ones(2))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=3, max_size=8, unique=True), st.lists(st.integers(0, 50), max_size=5))
def test_histograms_keep_their_counts_when_they_are_aligned(bounds: list[int], more: list[int]) -> None:
    edges, finer = sorted(bounds), sorted({*bounds, *more})
    one = {(float(low), float(high)): float(high - low) for low, high in itertools.pairwise(edges)}
    other = {(float(low), float(high)): float(high - low) for low, high in itertools.pairwise(finer)}
    left, right = aligned(one, other)
    # Both say that values are spread evenly, one over wider buckets.
    assert left.sum() == pytest.approx(sum(one.values())) and right.sum() == pytest.approx(sum(other.values()))
    inside = [edges[0] <= low < edges[-1] for low in finer[:-1]]
    np.testing.assert_allclose(left[inside], right[inside])


def test_single_points_stand_beside_the_buckets() -> None:
    left, right = aligned({(3.0, 3.0): 5.0, (0.0, 4.0): 8.0}, {(0.0, 4.0): 1.0})
    assert left.tolist() == [8.0, 5.0] and right.tolist() == [1.0, 0.0]
