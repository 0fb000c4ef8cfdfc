"""Which inputs of a program speak of the same thing, so that an explanation names them together."""

from __future__ import annotations

from collections.abc import Mapping
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
            candidates  which categories are scored because they are the user's own, or came next
            category    one of the user's categories: its windows
            action      one action: its counts
            outcomes    what was engaged with, of what has a label
            variety     how many categories and items
            rhythm      gaps, sessions, days
            succession  what over all users came next after the newest category
            sequence    the latest events in their order
            user        the user's row
            context     the user's attributes
            crosses     what crosses say of the pair
            pair        the item and its category, the same in both answers
        place: Of a category its slot, of an action its number; else 0.
    """

    kind: str
    place: int = 0


CANDIDATES = Group("candidates")
_KINDS = {
    "user_row": "user",
    "context_row": "context",
    "cross": "crosses",
    "popular_next": "succession",
    "successor_next": "succession",
    "recent_rows": "candidates",
    "successor_rows": "candidates",
}
_OWN = {"user": "user", "context": "context", "recent": "candidates", "successor": "candidates"}
_FEATURES = {"labelled": "outcomes", "positive": "outcomes", "labels": "variety", "items": "variety"}


def groups_of(spec: FeatureSpec, shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[Group], dict[str, I32]]:
    """The groups, and of each input that has a row for each question the number of the group of each of its values.

    >>> groups, numbers = groups_of(FeatureSpec(), {"user_row": (-1, 2), "recent_next": (-1, 3, 1), "popular_rows": (4, 2)})
    >>> [group.kind for group in groups], numbers["recent_next"].tolist()
    (['candidates', 'user', 'category', 'category', 'category'], [[2], [3], [4]])

    Args:
        spec: Names the features.
        shapes: Of the program's inputs.
    """
    numbers = {CANDIDATES: 0}

    def number(group: Group) -> int:
        return numbers.setdefault(group, len(numbers))

    found = {}
    for name, (rows, *shape) in shapes.items():
        if rows >= 0:
            continue
        if name == "features":
            found[name] = np.array([number(one) for one in _of_features(spec)], np.int32)
        elif name in ("category_windows", "recent_next"):
            slots = [number(Group("category", slot)) for slot in range(shape[0])]
            found[name] = np.repeat(np.array(slots, np.int32)[:, None], shape[1], 1)
        else:
            found[name] = np.full(shape, number(Group(_kind(name))), np.int32)
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
    if name.endswith("_mask"):
        return "candidates"
    return "sequence" if name.startswith("sequence") else _KINDS.get(name, "pair")
