"""Whether a compacted topic still has records of erased users: its ends do not tell."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from state.attributes.values import id_of
from state.errors import DecodeError, LogError
from state.events.identity import Salt, user_id
from state.features.erased import Erased
from state.log import Log
from state.segments.record import member_of

POLL_S, STALLED_S = 0.5, 30.0

Whose = Callable[[bytes | None], int]
"""The pseudonym of whom a record with this key is; 0, which nobody has, where it names no user."""


def first_left(log: Log, topic: str, whose: Whose, erased: Erased) -> int | None:
    """The first erasure of which the topic has a record; None where it has none.

    A record of before the erasure is one, and any tombstone: its key names
    the user. What a user who came back has sent since then is none.

    Args:
        log: Where the topic is. All of it is read: some 5 s for a million users.
        topic: Its name.
        whose: Says of whom a record is.
        erased: The erasures.

    Raises:
        LogError: It cannot be read, or nothing came for half a minute.
    """
    with log.topics() as topics:
        ends = {partition: end for partition, (_, end) in topics.ends(topic).items()}
    found = set[int]()
    heard_s = time.monotonic()
    with log.reader(topic) as reader:
        while any(reader.position(partition) < end for partition, end in ends.items()):
            batches = reader.poll(POLL_S)
            if batches:
                heard_s = time.monotonic()
            elif time.monotonic() - heard_s > STALLED_S:
                raise LogError(f"topic {topic}: nothing came for {STALLED_S:g} s")
            for batch in batches:
                keys = np.array([whose(key) for key in batch.keys], np.uint64)
                for at in np.flatnonzero(erased.users.has(keys)).tolist():
                    user, sent_ms, is_tombstone = int(keys[at]), batch.timestamps_ms[at], batch.values[at] is None
                    found |= {one.id for one in erased if user in one.users and (is_tombstone or sent_ms < one.at_ms)}
    return min(found, default=None)


def of_attributes(salt: Salt) -> Whose:
    """Of the topic of users' attributes, whose keys are plain ids."""

    def whose(key: bytes | None) -> int:
        try:
            return user_id(salt, id_of(key))
        except DecodeError:
            return 0

    return whose


def of_segments(key: bytes | None) -> int:
    """Of the topic of memberships.

    >>> of_segments(b"00000000000000ab:sporty"), of_segments(b"x")
    (171, 0)
    """
    member = member_of(key)
    return 0 if member is None else member[1]
