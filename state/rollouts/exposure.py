"""Exposures: records of `kafka.exposures_topic`, each for one answer to a user during a rollout, with the arm.

A record is one JSON object, keyed by the pseudonym; `state/FORMATS.md` has an example. An exposure contains neither
the content of the answer nor the user's id as it was sent.
"""

from __future__ import annotations

import msgspec

from state.rollouts.assignment import Arm


class Exposure(msgspec.Struct, frozen=True):
    """An answer to a user during a rollout.

    Attributes:
        user: The pseudonym, 16 hexadecimal digits.
        rollout: The trial's name.
        step: Step of the rollout.
        share: Share of users in the arm `trial` at this step.
        arm: The user's arm, even if the trial could not answer and the live trainer's version did. Otherwise users
            whom the trial fails would count for the other side.
        at_ms: When the request arrived, wall clock.
        took_us: Latency in microseconds; None in a batch, where each arm answers a part of another size.
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
        return msgspec.json.decode(value, type=Exposure)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
