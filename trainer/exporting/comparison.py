"""How far apart two programs are on the same rows: in probabilities, and in who comes first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from state.lowering import difference

F32 = npt.NDArray[np.float32]
Outputs = Mapping[str, F32]
LOGITS = ("recent_logits", "popular_logits", "successor_logits")
TIMED = 200


class Agreement(NamedTuple):
    """What of one program differs from another's.

    Attributes:
        rows: Compared.
        outputs: The largest difference of any output, relative to 1 + the other's value.
        probability: The largest difference of an interest's or an engagement's probability.
        first: Share of rows in which the same category is the most probable.
    """

    rows: int
    outputs: float
    probability: float
    first: float


def agreement(ours: Outputs, theirs: Outputs) -> Agreement:
    """Compares outputs of n rows.

    Args:
        ours: Of the program that is looked at.
        theirs: Of the one that it should agree with, by the same names.
    """
    interests = [_softmax(np.concatenate([one[name] for name in LOGITS], 1)) for one in (ours, theirs)]
    engagement = [1 / (1 + np.exp(-one["engagement_logit"].astype(np.float64))) for one in (ours, theirs)]
    apart = [np.abs(one[0] - one[1]).max() for one in (interests, engagement)]
    first = interests[0].argmax(1) == interests[1].argmax(1)
    return Agreement(
        len(first),
        max(difference(ours[name], value) for name, value in theirs.items()),
        float(max(apart)),
        float(first.mean()),
    )


def _softmax(logits: F32) -> npt.NDArray[np.float64]:
    grown = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return np.asarray(grown / grown.sum(1, keepdims=True))


def median_us(call: Callable[[int], object], rows: int, elapsed: Callable[[], float]) -> float:
    """Median microseconds of `call(row)`, one row after another.

    Args:
        call: Answers one row.
        rows: How many there are.
        elapsed: Monotonic seconds.
    """
    took = []
    for count in range(TIMED):
        began_s = elapsed()
        call(count % rows)
        took.append(elapsed() - began_s)
    return float(np.median(took)) * 1e6


def one_row(inputs: Mapping[str, npt.NDArray[Any]], fixed: frozenset[str], row: int) -> dict[str, npt.NDArray[Any]]:
    """The inputs of one row alone.

    Args:
        inputs: By name, of n rows.
        fixed: Names of those that are no row's own.
        row: Which.
    """
    return {name: value if name in fixed else value[row : row + 1] for name, value in inputs.items()}
