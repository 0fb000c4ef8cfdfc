"""What an advertiser asks of a ranking: bids, and how often a user may see an item. Pure.

With bids the order is by expected value, probability × bid. A cap counts what the
user's history has of the item: its impressions where actions are configured as
such (`labels.impressions`), else all its events. How fast a budget is spent is
the caller's to pace: nothing is remembered of what was answered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from state.errors import BadRequest
from state.features.spec import Events, FeatureSpec


@dataclass(frozen=True)
class Cap:
    """How often at most a user may have seen an item.

    Attributes:
        count: From so many on it is left out.
        within_s: In so many seconds before the time that is asked for.
    """

    count: int
    within_s: float


class LeftOut(TypedDict):
    """An item that is not ranked, why, and how often the user saw it within its cap's time."""

    item: str
    reason: Literal["cap"]
    seen: int


def bids_of(bids: Sequence[float | None]) -> NDArray[np.float64] | None:
    """The bids of n items, `[n]` float64; None where no item has one.

    >>> bids_of([1.5, 0.0]).tolist(), bids_of([None, None])
    ([1.5, 0.0], None)

    Raises:
        BadRequest: Some items have one and others do not, or one is negative or not finite.
    """
    if all(one is None for one in bids):
        return None
    for place, bid in enumerate(bids):
        if bid is None:
            raise BadRequest(
                f"item {place} has no bid, others have", "give each item a bid, or none", f"/items/{place}"
            )
        if not (math.isfinite(bid) and bid >= 0):
            raise BadRequest(
                f"item {place} has a bid of {bid}", "give a finite number, 0 or more", f"/items/{place}/bid"
            )
    return np.array(bids, np.float64)


def check_caps(caps: Sequence[Cap | None], spec: FeatureSpec) -> None:
    """Refuses caps of which a history cannot say whether they are reached.

    >>> check_caps([Cap(3, 86400.0), None], FeatureSpec())

    Args:
        caps: Of n items.
        spec: Of the version that answers: how many events a history holds, and for how long it surely has them.

    Raises:
        BadRequest: A count is less than 1 or more than a history holds, or a time is not above 0 or beyond the longest window.
    """
    longest_s = spec.windows_s[-1]
    for place, cap in enumerate(caps):
        if cap is None:
            continue
        if not 1 <= cap.count <= spec.history:
            do = f"give 1 to {spec.history}, the events that a history holds (features.history)"
            raise BadRequest(f"item {place} has a cap of {cap.count} times", do, f"/items/{place}/cap/count")
        if not 0 < cap.within_s <= longest_s:
            do = f"give seconds above 0, up to the longest window's {longest_s} (features.windows_s)"
            raise BadRequest(f"item {place} has a cap within {cap.within_s} s", do, f"/items/{place}/cap/within_s")


def over_caps(
    items: Sequence[int], caps: Sequence[Cap | None], events: Events, impressions: Sequence[int], at_ms: int
) -> dict[int, int]:
    """Which of n items have reached their caps, by place, and how often the user saw each within its cap's time.

    Args:
        items: Their ids.
        caps: Of each the cap; None where it has none.
        events: The user's, as they count for this answer.
        impressions: Numbers of the actions that are counted; all where there are none.
        at_ms: The time that is asked for; events up to it count, and those later than `within_s` before it.
    """
    shown = events[np.isin(events["action"], impressions)] if len(impressions) else events
    times: dict[int, list[int]] = {}
    for item, event_ms in zip(shown["item"].tolist(), shown["at_ms"].tolist(), strict=True):
        times.setdefault(item, []).append(event_ms)
    found = {}
    for place, (item, cap) in enumerate(zip(items, caps, strict=True)):
        if cap is not None:
            after_ms = at_ms - round(cap.within_s * 1000)
            seen = sum(after_ms < event_ms <= at_ms for event_ms in times.get(item, ()))
            if seen >= cap.count:
                found[place] = seen
    return found
