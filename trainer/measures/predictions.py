"""Predictions of each row's category, by the model and by simple baselines, before the category was known:

    model      the candidates that serving has, by their logits; the last slot of training is not among them
    popular    all categories by their clicks over all users, halved each hour of log time
    previous   the one category of the user's previous event
    came_next  what came next after that one, by the counts of transitions (`state/ranking/transitions.py`)

Each predictor ranks candidates and assigns them shares that add up to 1. `progressive.py` defines the cost of a category
that is no candidate.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from state.compiled import compiled, layout
from state.ranking.transitions import FOLLOWERS
from trainer.tables.index import I32, U64
from trainer.tables.lists import CountTable
from trainer.tables.popular import Popular

F64 = npt.NDArray[np.float64]

PREDICTORS = ("model", "popular", "previous", "came_next")
BASELINES = PREDICTORS[1:]

NONE = -1
"""The rank of a category that is no candidate."""

LISTED = 64
"""Popular categories whose order is kept. Any other counted category gets the next rank."""

COUNTED = 8192
"""The most categories that are counted for the popular ones."""

SPAN_MS, KEPT = 300_000, 61_858
"""Every SPAN_MS (five minutes of log time) a count decays by KEPT / 65536 = 2 ** (-1 / 12): half after an hour."""


@layout("i4[::1], f8[::1], i4[::1]")
class CategoryPrediction(NamedTuple):
    """The prediction of one predictor for t rows.

    Attributes:
        rank: `[t]` int32, candidates before the row's category; NONE if it is no candidate.
        log_share: `[t]` float64, logarithm of its share; 0 if it is no candidate.
        candidates: `[t]` int32, the number of candidates.
    """

    rank: I32
    log_share: F64
    candidates: I32


def hourly_popular() -> Popular:
    """An empty counter for the popular categories of about the last hour."""
    return Popular(LISTED, COUNTED, SPAN_MS, KEPT)


def of_popular(popular: Popular, category: U64) -> CategoryPrediction:
    """The prediction by the clicks of about the last hour, for `[t]` categories.

    >>> popular = hourly_popular()
    >>> popular.update(np.array([5, 7, 7, 7], np.uint64), 0)
    >>> found = of_popular(popular, np.array([5, 9], np.uint64))
    >>> found.rank.tolist(), np.exp(found.log_share).tolist(), found.candidates.tolist()
    ([1, -1], [0.25, 1.0], [2, 2])
    """
    counts, rank, total = popular.standing_of(category)
    is_candidate = counts > 0
    return CategoryPrediction(
        np.where(is_candidate, rank, NONE).astype(np.int32),
        np.log(np.where(is_candidate, counts, max(total, 1)) / max(total, 1)),
        np.full(category.size, len(popular), np.int32),
    )


def of_previous(newest: U64, category: U64) -> CategoryPrediction:
    """The prediction by the category of the user's previous event (0 is none), for `[t]` categories.

    >>> found = of_previous(np.array([5, 5, 0], np.uint64), np.array([5, 7, 7], np.uint64))
    >>> found.rank.tolist(), found.candidates.tolist()
    ([0, -1, -1], [1, 1, 0])
    """
    return CategoryPrediction(
        np.where(newest == category, 0, NONE).astype(np.int32),
        np.zeros(category.size),
        (newest != 0).astype(np.int32),
    )


def of_came_next(transitions: CountTable, newest: I32, category: U64) -> CategoryPrediction:
    """The prediction by what came next after users' newest categories, whose `[t]` rows are `newest`."""
    lists, count = transitions.held, newest.size
    prediction = CategoryPrediction(np.empty(count, np.int32), np.empty(count), np.empty(count, np.int32))
    _came_next(newest, lists.counts, lists.ids, np.array(category), *prediction)
    return prediction


@compiled("i4[::1], i4[:, ::1], u8[:, ::1], u8[::1], i4[::1], f8[::1], i4[::1]")
def _came_next(at: I32, counts: I32, ids: U64, category: U64, rank: I32, log_share: F64, candidates: I32) -> None:
    for i in range(at.shape[0]):
        rank[i], log_share[i], candidates[i] = NONE, 0.0, 0
        if at[i] == 0:
            continue
        total, own_count = 0, 0
        for k in range(FOLLOWERS):
            count = counts[at[i], k]
            if count == 0:
                break
            candidates[i] += 1
            total += count
            if ids[at[i], k] == category[i]:
                rank[i], own_count = k, count
        if own_count > 0:
            log_share[i] = np.log(own_count / total)
