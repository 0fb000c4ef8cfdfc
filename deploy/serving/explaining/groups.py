"""Which inputs of a program speak of the same thing, so that an explanation names them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.features.spec import FeatureSpec
from state.rows.tables import own_rows_of

I32 = NDArray[np.int32]


class Group(NamedTuple):
    """Inputs that speak of the same thing.

    Attributes:
        kind: What that is:
            category    one of the user's categories: that it is scored as the user's own, with its windows
            action      one action: its counts
            outcomes    what was engaged with, of what has a label
            variety     how many categories and items
            rhythm      gaps, sessions, days
            succession  what over all users came next after the newest category, and that it is scored for that
            sequence    the latest events in their order
            user        the user's row
            context     the user's attributes
            crosses     what crosses say of the pair
            pair        the item and its category, the same in both answers
        place: Of a category its slot, of an action its number; else 0.
    """

    kind: str
    place: int = 0


_KINDS = {
    "user_row": "user",
    "context_row": "context",
    "cross": "crosses",
    "popular_next": "succession",
    "successor_next": "succession",
    "successor_rows": "succession",
    "successor_mask": "succession",
}
_OWN = {"user": "user", "context": "context", "successor": "succession"}
_BY_CATEGORY = ("category_windows", "recent_next", "recent_rows", "recent_mask")
_FEATURES = {"labelled": "outcomes", "positive": "outcomes", "labels": "variety", "items": "variety"}


def groups_of(
    spec: FeatureSpec, shapes: Mapping[str, tuple[int, ...]], own_popular: Sequence[int]
) -> tuple[list[Group], dict[str, I32]]:
    """The groups, and of each input that has a row for each question the number of the group of each of its values.

    A popular category that is the user's own is scored once, as the user's own.
    So its place among the popular ones belongs to the group of the category.

    >>> shapes = {"user_row": (-1, 2), "recent_next": (-1, 2, 1), "popular_mask": (-1, 3), "popular_rows": (3, 2)}
    >>> groups, numbers = groups_of(FeatureSpec(), shapes, [-1, 1, -1])
    >>> [group.kind for group in groups], numbers["recent_next"].tolist(), numbers["popular_mask"].tolist()
    (['user', 'category', 'category', 'pair'], [[1], [2]], [3, 2, 3])

    Args:
        spec: Names the features.
        shapes: Of the program's inputs.
        own_popular: Of each popular category its slot among the user's own, -1 of one that is none of them.
    """
    numbers = dict[Group, int]()

    def number(group: Group) -> int:
        return numbers.setdefault(group, len(numbers))

    found = {}
    for name, (rows, *shape) in shapes.items():
        own = own_rows_of(name)
        if rows >= 0:
            continue
        if name == "features":
            of = [number(one) for one in _of_features(spec)]
        elif name in _BY_CATEGORY or (own is not None and own[1] == "recent"):
            of = [number(Group("category", slot)) for slot in range(shape[0])]
        elif name == "popular_mask":
            of = [number(Group("category", slot) if slot >= 0 else Group("pair")) for slot in own_popular]
        else:
            of = [number(Group(_kind(name)))] * (shape[0] if shape else 1)
        found[name] = np.broadcast_to(np.array(of, np.int32).reshape(-1, *[1] * (len(shape) - 1)), shape or (1,))
    return list(numbers), found


def _of_features(spec: FeatureSpec) -> list[Group]:
    """The group of each feature, in the order of the names."""
    of_action = len(spec.windows_s) + len(spec.half_lives_s) + 1
    groups = [Group("action", place) for place in range(len(spec.actions)) for _ in range(of_action)]
    for name in spec.names[len(groups) :]:
        head, _, rest = name.partition(".")
        slot = int(rest.partition(".")[0]) - 1 if head == "label" else 0
        groups.append(Group("category", slot) if head == "label" else Group(_FEATURES.get(head, "rhythm")))
    return groups


def _kind(name: str) -> str:
    """The kind of an input all of whose values speak of the same thing."""
    own = own_rows_of(name)
    if own is not None:
        return "sequence" if own[1].startswith("sequence") else _OWN.get(own[1], "pair")
    return "sequence" if name.startswith("sequence") else _KINDS.get(name, "pair")
