"""Functions on an LMDB cursor that find the age of users' histories, and remove old events and whole users."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import lmdb
import numpy as np
from numpy.typing import NDArray

from state.features.spec import Events
from state.history.chunks import EVENT_BYTES, Chunks, by_user, events_in, key_of, prefix_of

IsOld = Callable[[Events], NDArray[np.bool_]]
"""Which of `[m]` EVENT are old, `[m]` bool."""

_FIRST = key_of(b"", 0)  # ends the key of a user's first chunk
_USERS = 1 << 64


class Ends(NamedTuple):
    """The first and last events of some users' histories, ordered by pseudonym.

    Attributes:
        users: k pseudonyms.
        newest: `[k]` EVENT, the last event appended for each user.
        oldest: `[k]` EVENT, the first event kept for each user.
        following: The next user in the store; None at its end.
    """

    users: list[int]
    newest: Events
    oldest: Events
    following: int | None


def ends(cursor: lmdb.Cursor, start: int, limit: int) -> Ends:
    """The ends of `limit` users' histories from user `start` on; reads at most two chunks per user."""
    users: list[int] = []
    newest: list[bytes] = []
    oldest: list[bytes] = []
    found = cursor.set_range(prefix_of(start))
    while found and len(users) < limit:
        key, value = cast(tuple[bytes, bytes], cursor.item())
        user = int.from_bytes(key[:8], "big")
        users.append(user)
        newest.append(value[-EVENT_BYTES:])
        if key[8:] == _FIRST:
            found = cursor.next()
        elif found := user + 1 < _USERS and cursor.set_range(prefix_of(user + 1)):
            cursor.prev()
            value = cast(bytes, cursor.value())
            cursor.next()
        else:
            cursor.last()
            value = cast(bytes, cursor.value())
        oldest.append(value[:EVENT_BYTES])
    following = int.from_bytes(cursor.key()[:8], "big") if found else None
    return Ends(users, events_in(b"".join(newest)), events_in(b"".join(oldest)), following)


def all_of(cursor: lmdb.Cursor, user: int) -> Chunks:
    """A user's chunks, newest first; empty if the user is unknown."""
    prefix = prefix_of(user)
    found, theirs = next(by_user(cursor, prefix), (b"", Chunks()))
    return theirs if found == prefix else []


def leading_old(chunks: Chunks, is_old: Callable[[Events], NDArray[np.bool_]]) -> tuple[list[bytes], int]:
    """The keys of a user's leading chunks that contain only old events, and the number of these events."""
    keys: list[bytes] = []
    events = 0
    for key, value in reversed(chunks):
        if not is_old(events_in(value)).all():
            break
        keys.append(key)
        events += len(value) // EVENT_BYTES
    return keys, events


class Removed(NamedTuple):
    """Counts of removed events and users.

    Attributes:
        events: Old events removed.
        aged: Users removed because all their events were old.
        evicted: Users evicted.
    """

    events: int = 0
    aged: int = 0
    evicted: int = 0


def remove(cursor: lmdb.Cursor, aged: Sequence[int], is_old: IsOld, evicted: Sequence[int]) -> Removed:
    """Deletes the leading chunks of `aged` users that contain only old events, and all chunks of `evicted` users."""
    keys = [[key for key, _ in all_of(cursor, user)] for user in evicted]
    known = sum(map(bool, keys))
    events = gone = 0
    for user in aged:
        theirs = all_of(cursor, user)
        old, deleted = leading_old(theirs, is_old)
        keys.append(old)
        events += deleted
        gone += bool(theirs) and len(old) == len(theirs)
    for key in (key for theirs in keys for key in theirs):
        cursor.pop(key)
    return Removed(events, gone, known)
