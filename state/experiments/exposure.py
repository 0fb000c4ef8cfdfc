"""Arms of a rollout and exposures: records of `kafka.exposures_topic`, one for each answer to a user during a rollout."""

from __future__ import annotations

import hmac
from typing import Literal

import msgspec

from state.disk import documents
from state.events.identity import Salt

Arm = Literal["trial", "live"]
TRIAL: Arm = "trial"
LIVE: Arm = "live"
ARMS = (TRIAL, LIVE)


def position_of(salt: Salt, name: str, user: int) -> float:
    """Returns a user's position between 0 and 1.

    It is the HMAC-SHA-256 of the rollout's name and the pseudonym, keyed by the salt. So without the salt, a client
    cannot choose an id that falls into a given arm. Positions in two rollouts are independent.

    >>> salt = Salt(b"not a secret")
    >>> position_of(salt, "wider", 7) == position_of(salt, "wider", 7) != position_of(salt, "deeper", 7)
    True
    """
    digest = hmac.digest(salt.key, b"rollout " + name.encode() + b" " + user.to_bytes(8, "big"), "sha256")
    return int.from_bytes(digest[:8], "big") / 2**64


def arm_of(position: float, share: float) -> Arm:
    """Returns the arm of a user when the trial has the given share. A user in the trial at 5 % is also in it at 50 %.

    >>> arm_of(0.04, 0.05), arm_of(0.04, 0.5), arm_of(0.4, 0.05), arm_of(0.99, 1.0)
    ('trial', 'trial', 'live', 'trial')
    """
    return TRIAL if position < share else LIVE


class Exposure(msgspec.Struct, frozen=True):
    """An answer to a user during a rollout.

    Attributes:
        user: The pseudonym, 16 hexadecimal digits.
        rollout: The experiment's name.
        step: Step of the rollout.
        share: Share of users in the arm `trial` at this step.
        arm: The user's arm, even if the trial failed and the live version answered: the failure counts for the trial.
        at_ms: When the request arrived, wall clock.
        took_us: Latency in microseconds; None in a batch, because the arms answer parts of different sizes.
        failed: Whether the arm could not answer.
    """

    user: str
    rollout: str
    step: int
    share: float
    arm: Arm
    at_ms: int
    took_us: int | None
    failed: bool = False


def encode(exposure: Exposure) -> bytes:
    """Encodes a record's value.

    >>> encode(Exposure("00000000000000ff", "wider", 0, 0.01, "live", 5, 900))[:38]
    b'{"user":"00000000000000ff","rollout":"'
    """
    return msgspec.json.encode(exposure)


def decode(value: bytes) -> Exposure | None:
    """Decodes the exposure of a record; None if it is not one, so that other writers cannot distort a verdict.

    >>> decode(b"{}") is None
    True
    """
    try:
        return documents.decode(value, Exposure)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
