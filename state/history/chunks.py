"""The LMDB format of users' events: a few chunks of 16, newest first. Functions on a cursor.

user u64 BE, ~chunk u32 BE -> up to 16 EVENTs, in append order

The chunk's number is stored inverted, so that one seek finds a user's newest chunk. Its number and length give the
user's total number of events. An append rewrites only this small value. Chunks before the last N events are deleted.
A sweep reads the first and last events of users' histories, and removes old events and whole users.

p:<source> -> the counts of a source: its position, and the outcomes of its offsets, JSON
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple, cast

import lmdb
import numpy as np
from numpy.typing import NDArray

from state.errors import PositionConflict
from state.features.spec import EVENT, Events
from state.history.appends import Appends
from state.positions import RARE, Range, Source

CHUNK = 16
EVENT_BYTES = EVENT.itemsize
_CHUNK_BYTES = CHUNK * EVENT_BYTES
_INVERT = (1 << 32) - 1

Chunks = list[tuple[bytes, bytes]]


def prefix_of(user: int) -> bytes:
    """The common prefix of the keys of a user's chunks."""
    return user.to_bytes(8, "big")


def key_of(prefix: bytes, chunk: int) -> bytes:
    """The key of a user's chunk."""
    return prefix + (_INVERT - chunk).to_bytes(4, "big")


def number_of(key: bytes) -> int:
    """The chunk's number."""
    return _INVERT - int.from_bytes(key[8:12], "big")


def read(cursor: lmdb.Cursor, prefix: bytes, history: int) -> tuple[bytes, int]:
    """The chunks that hold a user's last `history` events, joined, and the user's total number of events."""
    if not cursor.set_range(prefix):
        return b"", 0
    key, value = cast(tuple[bytes, bytes], cursor.item())
    if key[:8] != prefix:
        return b"", 0
    total = number_of(key) * CHUNK + len(value) // EVENT_BYTES
    # Keys of older chunks are higher; keys of other users are higher than the user's oldest one.
    oldest = key_of(prefix, max(0, total - history) // CHUNK)
    values = []
    # The cursor is at the newest chunk.
    for key, value in cast(Iterator[tuple[bytes, bytes]], iter(cursor)):
        if key > oldest:
            break
        values.append(value)
    values.reverse()
    return b"".join(values), total


def append(cursor: lmdb.Cursor, appends: Appends, history: int) -> int:
    """Writes changed chunks, and deletes chunks before the last `history` events; returns the number of new users."""
    data = appends.events.tobytes()
    prefixes = appends.users.astype(">u8").tobytes()
    passed: list[bytes] = []
    new = 0
    starts = (appends.starts * EVENT_BYTES).tolist()
    lengths = (appends.lengths * EVENT_BYTES).tolist()
    # A chunk is written at once, where the cursor is: later LMDB would have to find its page again.
    seek, put = cursor.set_range, cursor.put
    item = cast(Callable[[], tuple[bytes, bytes]], cursor.item)
    for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        prefix = prefixes[8 * index : 8 * index + 8]
        gained = data[start : start + length]
        chunk = before = 0
        if seek(prefix):
            key, tail = item()
            if key[:8] == prefix:
                # Fast path: the newest chunk has space.
                if len(tail) + length <= _CHUNK_BYTES:
                    put(key, tail + gained)
                    continue
                chunk = number_of(key)
                before = chunk * CHUNK + len(tail) // EVENT_BYTES
                if len(tail) == _CHUNK_BYTES:
                    chunk += 1
                else:
                    gained = tail + gained
        new += before == 0
        floor = max(0, before + length // EVENT_BYTES - history) // CHUNK
        for begin in range(0, len(gained), _CHUNK_BYTES):
            if chunk >= floor:
                put(key_of(prefix, chunk), gained[begin : begin + _CHUNK_BYTES])
            chunk += 1
        # Chunks may have left the last N events while the newest chunk filled up.
        for number in range(max(0, before - CHUNK - history) // CHUNK, floor):
            passed.append(key_of(prefix, number))
    for key in passed:
        cursor.pop(key)
    return new


def by_user(cursor: lmdb.Cursor, start: bytes = b"") -> Iterator[tuple[bytes, Chunks]]:
    """Iterates over users from prefix `start` on, each with its chunks, newest first."""
    prefix, chunks = b"", Chunks()
    if not cursor.set_range(start):
        return
    for key, value in cursor:
        if key[:8] != prefix:
            if chunks:
                yield prefix, chunks
            prefix, chunks = bytes(key[:8]), []
        chunks.append((bytes(key), bytes(value)))
    if chunks:
        yield prefix, chunks


def total_of(chunks: Chunks) -> int:
    """A user's total number of events, from its chunks, newest first."""
    key, newest = chunks[0]
    return number_of(key) * CHUNK + len(newest) // EVENT_BYTES


def replace_all(cursor: lmdb.Cursor, prefix: bytes, events: Events, total: int) -> None:
    """Replaces a user's events by the last ones of `total`; without events the user is removed.

    If the newest chunk would lack its first events, its length would not give the total. The total is then lowered.
    """
    if cursor.set_range(prefix):
        while bytes(cursor.key())[:8] == prefix and cursor.delete():
            pass
    first = total - len(events)
    if first // CHUNK == (total - 1) // CHUNK:
        first -= first % CHUNK
        total = first + len(events)
    data = events.tobytes()
    for number in range(first // CHUNK, -(-total // CHUNK) if len(events) else 0):
        low, high = (max(0, at - first) * EVENT_BYTES for at in (number * CHUNK, (number + 1) * CHUNK))
        cursor.put(key_of(prefix, number), data[low:high])


def digest(histories: Iterable[tuple[bytes, Events]]) -> str:
    """SHA-256 over users' histories."""
    sha = hashlib.sha256()
    for prefix, events in histories:
        sha.update(prefix + len(events).to_bytes(4, "big") + events.tobytes())
    return sha.hexdigest()


def events_in(value: bytes) -> Events:
    """Decodes the events of a chunk, `[m]` EVENT."""
    return np.frombuffer(value, EVENT)


IsOld = Callable[[Events], NDArray[np.bool_]]
"""Which of `[m]` EVENT are old, `[m]` bool."""

_FIRST = key_of(b"", 0)  # ends the key of a user's first chunk
_USERS = 1 << 64


class Ends(NamedTuple):
    """The first and last events of k users' histories, ordered by pseudonym.

    Attributes:
        users: The pseudonyms.
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
    more = cursor.set_range(prefix_of(start))
    while more and len(users) < limit:
        key, value = cast(tuple[bytes, bytes], cursor.item())
        user = int.from_bytes(key[:8], "big")
        users.append(user)
        newest.append(value[-EVENT_BYTES:])
        if key[8:] == _FIRST:
            more = cursor.next()
        elif more := user + 1 < _USERS and cursor.set_range(prefix_of(user + 1)):
            cursor.prev()
            value = cast(bytes, cursor.value())
            cursor.next()
        else:
            cursor.last()
            value = cast(bytes, cursor.value())
        oldest.append(value[:EVENT_BYTES])
    following = int.from_bytes(cursor.key()[:8], "big") if more else None
    return Ends(users, events_in(b"".join(newest)), events_in(b"".join(oldest)), following)


def all_of(cursor: lmdb.Cursor, user: int) -> Chunks:
    """A user's chunks, newest first; empty if the user is unknown."""
    prefix = prefix_of(user)
    key, own = next(by_user(cursor, prefix), (b"", Chunks()))
    return own if key == prefix else []


class Removed(NamedTuple):
    """Counts of old events removed, of users removed because all their events were old, and of users evicted."""

    events: int = 0
    aged: int = 0
    evicted: int = 0


def remove(cursor: lmdb.Cursor, aged: Sequence[int], is_old: IsOld, evicted: Sequence[int]) -> Removed:
    """Deletes the leading chunks of `aged` users that contain only old events, and all chunks of `evicted` users."""
    keys = [[key for key, _ in all_of(cursor, user)] for user in evicted]
    evicted_users = sum(map(bool, keys))
    events = emptied = 0
    for user in aged:
        chunks = all_of(cursor, user)
        old = list(takewhile(lambda chunk: is_old(events_in(chunk[1])).all(), reversed(chunks)))
        keys.append([key for key, _ in old])
        events += sum(len(value) for _, value in old) // EVENT_BYTES
        emptied += bool(chunks) and len(old) == len(chunks)
    for key in (key for keys_of_user in keys for key in keys_of_user):
        cursor.pop(key)
    return Removed(events, emptied, evicted_users)


OUTCOMES = ("rows", "dead", "filtered", "absent")

Counts = dict[str, int]


def advanced_counts(counts: Mapping[str, int] | None, part: Range, holder: str) -> Counts:
    """The counts of a source after reading `part`; PositionConflict if the range begins at another offset."""
    after = {"first": part.first, "next": part.first, **dict.fromkeys(OUTCOMES, 0)} if counts is None else dict(counts)
    if after["next"] != part.first:
        raise PositionConflict(
            f"{holder} has read {part.source} up to {after['next']}, and the batch begins at {part.first}",
            "stop the second writer and start again: reading continues at the stored position",
        )
    after["next"] = part.next
    for name, count in part.outcomes.items():
        after[name] = after.get(name, 0) + count
    return after


def returned_counts(counts: Mapping[str, int], removed: Mapping[str, int], at: int) -> Counts:
    """The counts of a source after a rollback to offset `at`, which removes the outcomes `removed` since then."""
    remaining = {name: count - removed.get(name, 0) for name, count in counts.items()}
    named = {name: count for name, count in remaining.items() if count or name not in RARE}
    return {**named, "first": counts["first"], "next": at}


def counts_key(source: Source) -> bytes:
    """The key under which the store keeps the counts of a source."""
    return b"p:" + str(source).encode()


def move_counts(cursor: lmdb.Cursor, part: Range, holder: str) -> None:
    """Advances the stored counts of the range's source; see `advanced_counts`."""
    key = counts_key(part.source)
    stored = cursor.get(key)
    counts = advanced_counts(None if stored is None else json.loads(bytes(stored)), part, holder)
    cursor.put(key, json.dumps(counts).encode())


def summed_counts(sources: Iterable[Mapping[str, int]]) -> Counts:
    """Outcomes summed over all sources, with `positions`, the offsets passed. Counts of `RARE` occur only if not 0."""
    counts = list(sources)
    sums = {name: sum(count[name] for count in counts) for name in OUTCOMES}
    sums |= {name: total for name in RARE if (total := sum(count.get(name, 0) for count in counts))}
    passed = sum(count["next"] - count["first"] for count in counts)
    return {"positions": passed - sums.get("elsewhere", 0), **sums}
