"""An exposure: that a user was answered while a rollout was open, by which arm; a record of `kafka.exposures_topic`.

JSON, one object a record, keyed by the pseudonym; `state/FORMATS.md` has an example. What an exposure does not have is
anything of the answer, or the user's id as it was sent.
"""

from __future__ import annotations

import msgspec

from state.rollouts.assignment import Arm


class Exposure(msgspec.Struct, frozen=True):
    """One answer.

    Attributes:
        user: The pseudonym, 16 hexadecimal digits.
        rollout: The trial's name.
        step: Which step of the rollout it was.
        share: Of the users that are in its arm `trial` there.
        arm: The user's. Where the trial could not answer, the live trainer's version did, and the arm is the user's all the same:
            else whom the trial fails would be counted for the other side.
        at_ms: When the question came, wall clock.
        took_us: Until the answer, microseconds; None in a batch, where each arm answers a part of another size.
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
    """A record's value.

    >>> encode(Exposure("00000000000000ff", "wider", 0, 0.01, "live", 5, 900))[:38]
    b'{"user":"00000000000000ff","rollout":"'
    """
    return msgspec.json.encode(exposure)


def decode(value: bytes) -> Exposure | None:
    """The exposure of a record; None where it is none: whoever else writes there spoils no verdict.

    >>> decode(b"{}") is None
    True
    """
    try:
        return msgspec.json.decode(value, type=Exposure)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
