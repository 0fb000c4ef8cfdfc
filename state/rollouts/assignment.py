"""Who is in which arm: a keyed hash of the pseudonym, so that shares are nested and a user stays where they were. Pure."""

from __future__ import annotations

import hmac
from typing import Literal

from state.events.identity import Salt

Arm = Literal["trial", "live"]
TRIAL: Arm = "trial"
LIVE: Arm = "live"
ARMS = (TRIAL, LIVE)


def place_of(salt: Salt, name: str, user: int) -> float:
    """Where a user stands between 0 and 1: HMAC-SHA-256 of the rollout's name and the pseudonym, by the salt.

    Nobody without the salt can choose an id that comes into an arm, and the places of two rollouts have nothing to do with
    each other.

    >>> salt = Salt(b"not a secret")
    >>> place_of(salt, "wider", 7) == place_of(salt, "wider", 7) != place_of(salt, "deeper", 7)
    True
    """
    digest = hmac.digest(salt.key, b"rollout " + name.encode() + b" " + user.to_bytes(8, "big"), "sha256")
    return int.from_bytes(digest[:8], "big") / 2**64


def arm_of(place: float, share: float) -> Arm:
    """The arm at a share of the users: who is in at 5 % is in at 50 %.

    >>> arm_of(0.04, 0.05), arm_of(0.04, 0.5), arm_of(0.4, 0.05), arm_of(0.99, 1.0)
    ('trial', 'trial', 'live', 'trial')
    """
    return TRIAL if place < share else LIVE
