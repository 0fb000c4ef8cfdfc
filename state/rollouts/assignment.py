"""Assigns users to arms of a rollout by a keyed hash of the pseudonym: nested shares, stable as shares grow. Pure."""

from __future__ import annotations

import hmac
from typing import Literal

from state.events.identity import Salt

Arm = Literal["trial", "live"]
TRIAL: Arm = "trial"
LIVE: Arm = "live"
ARMS = (TRIAL, LIVE)


def place_of(salt: Salt, name: str, user: int) -> float:
    """The user's position between 0 and 1: HMAC-SHA-256 of the rollout's name and the pseudonym, keyed by the salt.

    Without the salt nobody can choose an id that falls into a given arm. The positions of a user in two rollouts are
    independent.

    >>> salt = Salt(b"not a secret")
    >>> place_of(salt, "wider", 7) == place_of(salt, "wider", 7) != place_of(salt, "deeper", 7)
    True
    """
    digest = hmac.digest(salt.key, b"rollout " + name.encode() + b" " + user.to_bytes(8, "big"), "sha256")
    return int.from_bytes(digest[:8], "big") / 2**64


def arm_of(place: float, share: float) -> Arm:
    """The arm of a user when the trial has the given share. A user in the trial at 5 % is in it at 50 % too.

    >>> arm_of(0.04, 0.05), arm_of(0.04, 0.5), arm_of(0.4, 0.05), arm_of(0.99, 1.0)
    ('trial', 'trial', 'live', 'trial')
    """
    return TRIAL if place < share else LIVE
