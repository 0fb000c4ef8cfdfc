"""Bids and frequency caps for ranking, as advertising needs them. Pure functions.

With bids, items are ordered by expected value: probability × bid. A cap counts the
item's events in the user's history: only impressions if actions are configured as
such (`labels.impressions`), else all events. The caller paces the spending of a
budget, because serving keeps no record of its answers.
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
    """The maximum number of times that a user may have seen an item.

    Attributes:
        count: The item is left out once it was seen this many times.
        within_s: The number of seconds before the time of the query in which events count.
    """

    count: int
    within_s: float


class LeftOut(TypedDict):
    """An item that is not ranked, the reason, and how often the user saw it within the cap's period."""

    item: str
    reason: Literal["cap"]
    seen: int


def bids_of(bids: Sequence[float | None]) -> NDArray[np.float64] | None:
    """Returns the bids of n items, `[n]` float64; None if no item has one.

    >>> bids_of([1.5, 0.0]).tolist(), bids_of([None, None])
    ([1.5, 0.0], None)

    Raises:
        BadRequest: Some items have a bid and others do not, or a bid is negative or not finite.
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
    """Refuses caps that cannot be checked against a history.

    >>> check_caps([Cap(3, 86400.0), None], FeatureSpec())

    Args:
        caps: The caps of n items.
        spec: The served version's feature spec, which defines how many events a history holds, and for how long.

    Raises:
        BadRequest: A count is less than 1 or more than a history holds. Or a period is not above 0, or exceeds the
            longest window.
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
    """Returns the items that have reached their caps: index to the number of times seen within the cap's period.

    Args:
        items: The ids of n items.
        caps: The cap of each item; None if it has none.
        events: The user's events that count for this answer.
        impressions: The numbers of the actions that count; if empty, all count.
        at_ms: The time of the query; events count that are at most this late and less than `within_s` older.
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
