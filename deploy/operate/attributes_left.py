"""Whether the topic of the users' attributes still has records of erased users: it is compacted, so that its ends do not tell."""

from __future__ import annotations

import time

import numpy as np

from state.attributes.values import id_of
from state.errors import DecodeError, LogError
from state.events.identity import Salt, user_id
from state.features.erased import Erased
from state.log import Log

POLL_S, STALLED_S = 0.5, 30.0


def first_left(log: Log, topic: str, salt: Salt, erased: Erased) -> int | None:
    """The first erasure of which the topic has a record; None where it has none.

    A record of before the erasure is one, and any tombstone: its key is the
    plain id. What a user who came back has sent since then is none.

    Args:
        log: Where the topic is. All of it is read: some 5 s for a million users.
        topic: Its name.
        salt: That of the pseudonyms.
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
                keys = np.array([_pseudonym(salt, key) for key in batch.keys], np.uint64)
                for at in np.flatnonzero(erased.users.has(keys)).tolist():
                    user, sent_ms, is_tombstone = int(keys[at]), batch.timestamps_ms[at], batch.values[at] is None
                    found |= {one.id for one in erased if user in one.users and (is_tombstone or sent_ms < one.at_ms)}
    return min(found, default=None)


def _pseudonym(salt: Salt, key: bytes | None) -> int:
    """Of a record's key; 0, which nobody has, where it names no user."""
    try:
        return user_id(salt, id_of(key))
    except DecodeError:
        return 0
