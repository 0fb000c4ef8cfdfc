"""Integrated gradients of groups of inputs, out of values of the explained function alone.

Of a function F at x, against a baseline x', integrated gradients give the input i

    IG_i = (x_i - x'_i) * integral over a from 0 to 1 of dF/dx_i at x' + a (x - x')

and add up to F(x) - F(x') (Sundararajan, Taly and Yan 2017, "Axiomatic
Attribution for Deep Networks", equation 1 and proposition 1). A group has the
sum over its inputs. No derivative is needed: between two points of the line
the groups move on one after the other, once in their order and once in the
reverse one, and a group has the mean of the two differences that its move
makes. With g for the part of x - x' that is in a group and h for the step,

    in order   h F_g + h^2 (F_gg / 2 + sum of F_gj over earlier j) + ...
    reversed   h F_g + h^2 (F_gg / 2 + sum of F_gj over later j) + ...

so that the mean is h F_g + h^2 / 2 * (sum of F_gj over all j), the integral
over the step up to h^3. Whatever the steps are, the differences telescope: the
groups always add up to F(x) - F(x').
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def positions(groups: int, steps: int) -> F32:
    """Where on the line each group is, 0 at the baseline and 1 at the end, at each point where F is wanted.

    Counts are read through logarithms: the points lie closer together near the baseline.

    >>> positions(2, 1).tolist()
    [[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]

    Args:
        groups: One or more.
        steps: Into which the line is cut.

    Returns:
        `[steps + 1 + 2 steps (groups - 1), groups]` float32.
    """
    ends = ((np.arange(steps + 1) / steps) ** 2).astype(np.float32)
    moved = np.tri(groups - 1, groups, dtype=bool)
    begin, end = ends[:-1, None, None, None], ends[1:, None, None, None]
    between = np.where(np.stack([moved, moved[:, ::-1]]), end, begin).astype(np.float32)
    return np.concatenate([np.repeat(ends[:, None], groups, 1), between.reshape(-1, groups)])


def shares(values: F64, groups: int, steps: int) -> F64:
    """The integrated gradients of each group, `[groups]` float64; they add up to the last value on the line less the first.

    >>> at = positions(2, 1).astype(np.float64)
    >>> shares(3 * at[:, 0] + at[:, 0] * at[:, 1], 2, 1).tolist()
    [3.5, 0.5]

    Args:
        values: `[n]` float64, F at the points of `positions`.
        groups: As there.
        steps: As there.
    """
    line, between = values[: steps + 1], values[steps + 1 :].reshape(steps, 2, groups - 1)
    begin, end = (np.broadcast_to(one[:, None, None], (steps, 2, 1)) for one in (line[:-1], line[1:]))
    made: F64 = np.diff(np.concatenate([begin, between, end], axis=2), axis=2)
    found: F64 = (made[:, 0] + made[:, 1, ::-1]).sum(0) / 2
    return found
