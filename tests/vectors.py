"""The feature row of one user, from a history."""

from __future__ import annotations

from state.features.arrays import Vector
from state.features.spec import Events, FeatureSpec, Mask, vectorise_many


def vectorise(history: Events, at_ms: int, before: int | None, mask: Mask, spec: FeatureSpec, user: int = 0) -> Vector:
    """The row of one user as of `at_ms`, milliseconds, from a history in append order, `[m]` EVENT.

    Only its last N events count, and of `before` leading ones if that is not None. `user` is for masks that name users.
    """
    events = history if before is None else history[:before]
    return Vector(*[column[0] for column in vectorise_many([events], [at_ms], mask, spec, [user])])
