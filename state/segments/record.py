"""A user's membership of a segment, as a record of the compacted topic.

    key     <pseudonym, 16 hexadecimal digits>:<segment>
    value   {"in": true, "since": "<ISO 8601>", "since_ms": ..., "version": ...}, or none: the user is out

`since_ms` is the time of the profile by which the user joined, and `version` the
version that computed it. A user who leaves gets a tombstone. It removes the
record before when Kafka compacts the topic.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import NamedTuple

_KEY = re.compile(rb"([0-9a-f]{16}):([A-Za-z0-9_-]{1,64})")


class Membership(NamedTuple):
    """When a user joined a segment, milliseconds since the Unix epoch, and by which version."""

    since_ms: int
    version: int


Member = tuple[str, int]
"""A segment's name, and a pseudonym."""


def key_of(member: Member) -> bytes:
    """The key of a record.

    >>> key_of(("sporty", 0xAB))
    b'00000000000000ab:sporty'
    """
    segment, user = member
    return b"%016x:%b" % (user, segment.encode())


def value_of(membership: Membership | None) -> bytes | None:
    """The value of a record; None, a tombstone, for a user who is out.

    >>> value_of(Membership(1500, 7))
    b'{"in": true, "since": "1970-01-01T00:00:01.500Z", "since_ms": 1500, "version": 7}'
    """
    if membership is None:
        return None
    since = datetime.fromtimestamp(membership.since_ms / 1000, UTC).isoformat(timespec="milliseconds")
    told = {"in": True, "since": since.replace("+00:00", "Z"), "since_ms": membership.since_ms}
    return json.dumps(told | {"version": membership.version}).encode()


def member_of(key: bytes | None) -> Member | None:
    """Segment and user of a record with this key; None if the key is malformed.

    >>> member_of(b"00000000000000ab:sporty"), member_of(b"ab"), member_of(None)
    (('sporty', 171), None, None)
    """
    found = _KEY.fullmatch(key or b"")
    return None if found is None else (found[2].decode(), int(found[1], 16))


def membership_of(value: bytes | None) -> Membership | None:
    """The membership in a record's value; None for a tombstone.

    >>> membership_of(value_of(Membership(1500, 7))), membership_of(None)
    (Membership(since_ms=1500, version=7), None)

    Raises:
        ValueError: It is not a record of a membership.
    """
    if value is None:
        return None
    try:
        told = json.loads(value)
        return Membership(int(told["since_ms"]), int(told["version"])) if told["in"] is True else None
    except (KeyError, TypeError) as error:
        raise ValueError(f"no record of a membership: {error}") from None
