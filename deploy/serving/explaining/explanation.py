"""The form of an explanation; its fields are those of the JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

from deploy.serving.answer import About


class Behind(NamedTuple):
    """What lies behind a part.

    Attributes:
        words: In words.
        about: The category or the action that it is about; None where it is about neither.
        events: The newest of the events behind it, each with `at`, `action`, `category` and `item`.
    """

    words: str
    about: str | None
    events: Sequence[dict[str, str | None]]


class ExplainedPart(TypedDict):
    """A part of the difference.

    Attributes:
        kind: Of `deploy.serving.explaining.groups.Group`.
        about: The category or the action that it is about; None where it is about neither.
        share: What it adds to the probability; negative where it takes away.
        words: What lies behind it.
        events: The newest events behind it.
    """

    kind: str
    about: str | None
    share: float
    words: str
    events: Sequence[dict[str, str | None]]


@dataclass(slots=True)
class Explanation(About):
    """Why a probability is what it is, and not what it is for a user of whom nothing is known.

    Attributes:
        label: The category whose interest is explained; None for an item.
        item: The item whose engagement is explained; None for a category.
        probability: For this user.
        cold_start_probability: For a user of whom nothing is known, asked for at the same moment.
        reasons: The largest parts of the difference, the largest first.
        rest: The sum of all smaller parts: reasons and rest add up to the difference of the probabilities.
    """

    label: str | None
    item: str | None
    probability: float
    cold_start_probability: float
    reasons: list[ExplainedPart]
    rest: float
