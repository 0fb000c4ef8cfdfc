"""Whose probability an answer tells: a user's categories, popular ones, and what over all users came next after the newest.

A candidate's slot is its place in the program's logits: the user's categories,
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
"""Of candidates, in the order of their slots; so begin the names of the program's masks and logits."""


def came_next(rows: VersionRows, recent_categories: U64, popular: U64) -> Succession:
    """What the version's lists of users' newest categories say; a category without a list says nothing.

    Args:
        rows: Of the version; one of a release without lists, or with others, has none.
        recent_categories: `[n, L]` uint64, the users' categories, newest first, padded with 0.
        popular: `[P]` uint64, padded with 0.
    """
    at, lists = rows.transitions(recent_categories[:, 0].tolist())
    return succession(at, lists, recent_categories, popular)


def add_succession(inputs: Mapping[str, F32], found: Succession, rows: F32) -> None:
    """Says in the program's inputs how often each candidate came next, and which are candidates for that alone.

    Args:
        inputs: Zeros, of as many rows as there are users or more; nothing is said to the program of a release
            without successors.
        found: Of n users.
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
    """Probabilities of logits, `[n, k]` float32 each, by row.

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
    """Each user's candidates, best first.

    Args:
        users: Each user's categories, and the successors.
        popular: The popular categories that there are, none twice.
        popular_names: Their names.
        name_of: Names a category.
        most: How many of them each answer has at most; None for all.
        outputs: The program's, for the logits.
    """
    names = [f"{kind}_logits" for kind in KINDS]
    parts = [outputs[name][: len(users)] for name in names if name in outputs]
    logits = np.concatenate(parts, axis=1)
    slots, ranks = parts[0].shape[1], parts[1].shape[1]
    has_successors, named = len(parts) == len(KINDS), set(popular)
    counts = []
    for (own, successors), top in zip(users, most, strict=True):
        # A popular category that is the user's own is one candidate.
        count = len(own) + len(popular) - len(named.intersection(own))
        if has_successors:
            count += len(successors) - successors.count(0)
        counts.append(count if top is None else min(count, top))
    # What is no candidate has a logit far below any other, and comes last.
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
