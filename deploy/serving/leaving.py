"""Computes churn probabilities from the version's weights and the windows before each user's latest event.

The windows are computed as of the arrival of that event. So they equal those of
its row in the training log, which the weights were trained on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from state.churn.weights import ChurnWeights
from state.features.mask import Mask
from state.features.spec import Events, FeatureSpec, vectorise_many


def leaving(
    weights: ChurnWeights | None,
    histories: Sequence[Events],
    at_ms: Sequence[int],
    mask: Mask,
    spec: FeatureSpec,
    users: Sequence[int],
) -> list[float | None]:
    """Computes the churn probabilities of n users, each at its own time.

    Args:
        weights: The version's churn weights; None if it has none.
        histories: n arrays `[m]` EVENT in append order.
        at_ms: n times in milliseconds.
        mask: The events to exclude.
        spec: The version's feature spec.
        users: n pseudonyms.

    Returns:
        n probabilities; None for a user without events, or whose latest event is older than the trained horizon.
    """
    found: list[float | None] = [None] * len(histories)
    if weights is None:
        return found
    asked: list[tuple[int, Events, int, int]] = []
    for place, (events, now_ms, user) in enumerate(zip(histories, at_ms, users, strict=True)):
        latest = _latest(events, now_ms, mask, user)
        if latest is None or now_ms - (at := int(events["at_ms"][latest])) >= weights.horizon.reach_ms:
            continue
        asked.append((place, events[:latest], at, int(events["action"][latest])))
    if asked:
        places, before, times, actions = zip(*asked, strict=True)
        of_whom, ages = [users[place] for place in places], [at_ms[place] - at for place, _, at, _ in asked]
        windows = vectorise_many(before, times, mask, spec, of_whom).features[:, weights.inputs.columns]
        inputs = weights.inputs.of(windows, np.array(actions, np.uint8), np.array(ages, np.int64))
        for place, one in zip(places, weights.probabilities(inputs).tolist(), strict=True):
            found[place] = one
    return found


def _latest(events: Events, now_ms: int, mask: Mask, user: int) -> int | None:
    """Returns the index of the latest visible event, the last one appended if times are equal; None without one."""
    visible = np.flatnonzero(events["at_ms"] <= now_ms)
    if mask:
        visible = visible[~mask.events(events[visible], user)]
    if not visible.size:
        return None
    times = events["at_ms"][visible]
    return int(visible[visible.size - 1 - int(np.argmax(times[::-1]))])
