"""Shares of groups are integrated gradients: they add up whatever the steps, and are the integral of the gradient."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.serving.explaining.path import positions, shares


@pytest.mark.parametrize(("groups", "steps"), [(1, 1), (1, 8), (3, 2), (7, 8)])
def test_shares_add_up_whatever_the_steps(groups: int, steps: int) -> None:
    """Of any numbers at the points, jumps included."""
    at = positions(groups, steps)
    assert len(at) == steps + 1 + 2 * steps * (groups - 1)
    assert (at[0] == 0).all() and (at[steps] == 1).all()
    values = np.random.default_rng(groups).normal(size=len(at))
    found = shares(values, groups, steps)
    assert found.shape == (groups,) and found.sum() == pytest.approx(values[steps] - values[0])


def test_shares_are_the_integral_of_the_gradient() -> None:
    """Of a logistic function of a ReLU and a product, whose gradient is known; half the step, a quarter of the error."""

    def function(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(2 * np.maximum(x[:, 0] - 0.3, 0) + x[:, 1] * x[:, 2] - x[:, 2])))

    def gradient(x: np.ndarray) -> np.ndarray:
        slope = function(x) * (1 - function(x))
        inner = np.stack([2.0 * (x[:, 0] > 0.3), x[:, 2], x[:, 1] - 1], 1)
        return slope[:, None] * inner

    end = np.array([1.5, 2.0, -1.0])
    along = (np.arange(100_000) + 0.5) / 100_000
    wanted = end * gradient(along[:, None] * end).mean(0)
    apart = [
        np.abs(shares(function(positions(3, steps) * end), 3, steps) - wanted).max() / np.abs(wanted).sum()
        for steps in (4, 8, 16)
    ]
    assert apart[1] < 0.01 and apart[2] < apart[0] / 8
