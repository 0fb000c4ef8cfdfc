"""Candidate categories of an answer: a user's categories, popular ones, and successors of the newest category.

Successors are the categories that came next most often over all users. A
candidate's slot is its index in the program's logits: the user's categories,
newest first, then the popular ones, then the successors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from deploy.serving.answer import Interest
from deploy.serving.catalogue import ShownName
from deploy.serving.loaded_version import VersionRows
from deploy.serving.program import PAIRS
from state.ranking.transitions import Succession, succession

U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]

_PLACES = np.arange(PAIRS)[:, None]

KINDS = ("recent", "popular", "successor")
"""Kinds of candidates, in slot order; the names of the program's masks and logits begin with them."""


def came_next(rows: VersionRows, recent_categories: U64, popular: U64) -> Succession:
    """Looks up the transition lists of users' newest categories; a category without a list contributes nothing.

    Args:
        rows: The version's rows; a version of a release without lists, or with other lists, has none.
        recent_categories: `[n, L]` uint64, the users' categories, newest first, padded with 0.
        popular: `[P]` uint64, padded with 0.
    """
    at, lists = rows.transitions(recent_categories[:, 0].tolist())
    return succession(at, lists, recent_categories, popular)


def add_succession(inputs: Mapping[str, F32], found: Succession, rows: F32) -> None:
    """Fills in the program's inputs for transitions: how often each candidate came next, and the successors.

    Args:
        inputs: Zeros, with at least one row per user; left unchanged for the program of a release without
            successors.
        found: The transitions of n users.
        rows: `[n S, dim]` float32 rows of the successors' categories.
    """
    if "successor_mask" not in inputs:
        return
    count, successors = found.ids.shape
    said = {"recent_next": found.recent_categories, "popular_next": found.popular, "successor_next": found.successors}
    said |= {"successor_mask": found.ids != 0}
    for name, values in said.items():
        if name in inputs:
            inputs[name][:count] = values
    if "successor_rows" in inputs:
        inputs["successor_rows"][:count] = rows.reshape(count, successors, -1)


def softmax(logits: F32) -> F32:
    """Computes the softmax of each row; input and output are `[n, k]` float32.

    >>> softmax(np.array([[0.0, 0.0], [-1e9, 0.0]], np.float32)).tolist()
    [[0.5, 0.5], [0.0, 1.0]]
    """
    shares = np.exp(logits - np.maximum.reduce(logits, 1, keepdims=True))
    return np.asarray(shares / np.add.reduce(shares, 1, keepdims=True), np.float32)


def interests(
    users: Sequence[tuple[list[int], list[int]]],
    popular: Sequence[int],
    popular_names: Sequence[ShownName],
    name_of: Callable[[int], ShownName],
    most: Sequence[int | None],
    outputs: Mapping[str, F32],
) -> list[list[Interest]]:
    """Ranks each user's candidates, best first.

    Args:
        users: Each user's categories and successors.
        popular: The distinct popular categories.
        popular_names: Their names.
        name_of: Returns the name of a category.
        most: The maximum number of candidates for each answer; None for all.
        outputs: The program's outputs, which contain the logits.
    """
    names = [f"{kind}_logits" for kind in KINDS]
    parts = [outputs[name][: len(users)] for name in names if name in outputs]
    logits = np.concatenate(parts, axis=1)
    slots, ranks = parts[0].shape[1], parts[1].shape[1]
    has_successors, named = len(parts) == len(KINDS), set(popular)
    counts = []
    for (own, successors), top in zip(users, most, strict=True):
        # A popular category that is also the user's own counts as one candidate.
        count = len(own) + len(popular) - len(named.intersection(own))
        if has_successors:
            count += len(successors) - successors.count(0)
        counts.append(count if top is None else min(count, top))
    # An empty slot has a logit far below all others, so it sorts last.
    orders = np.argsort(-logits, axis=1, kind="stable")[:, : max(counts, default=0)]
    shares = softmax(logits)[_PLACES[: len(users)], orders].tolist()
    found: list[list[Interest]] = []
    for (own, successors), count, order, its in zip(users, counts, orders.tolist(), shares, strict=True):
        best: list[Interest] = []
        for slot, share in zip(order[:count], its, strict=False):
            if slot < slots:
                name, identity = name_of(own[slot])
            elif slot < slots + ranks:
                name, identity = popular_names[slot - slots]
            else:
                name, identity = name_of(successors[slot - slots - ranks])
            best.append({"label": name, "id": identity, "probability": share})
        found.append(best)
    return found
