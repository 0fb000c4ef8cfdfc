"""The LMDB format of users' events: a few chunks of 16, newest first. Functions on a cursor.

    user u64 BE, ~chunk u32 BE -> up to 16 EVENTs, in append order

The chunk's number is stored inverted, so that one seek finds a user's newest
chunk. Its number and length give the user's total number of events. An append
rewrites that one small value. Chunks below the last N events are deleted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import cast

import lmdb
import numpy as np

from state.features.spec import EVENT, Events
from state.history.appends import Appends

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
    """The chunk's number.

    >>> number_of(key_of(prefix_of(258), 3))
    3
    """
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
    """Writes the chunks that changed, and deletes the chunks before the last `history` events.

    Returns:
        The number of new users.
    """
    data = appends.events.tobytes()
    prefixes = appends.users.astype(">u8").tobytes()
    written: Chunks = []
    passed: list[bytes] = []
    new = 0
    starts = (appends.starts * EVENT_BYTES).tolist()
    lengths = (appends.lengths * EVENT_BYTES).tolist()
    seek = cursor.set_range
    item = cast(Callable[[], tuple[bytes, bytes]], cursor.item)
    for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        prefix = prefixes[8 * index : 8 * index + 8]
        gained = data[start : start + length]
        chunk = before = 0
        if seek(prefix):
            key, tail = item()
            if key[:8] == prefix:
                # The common case, kept short: the newest chunk has room.
                if len(tail) + length <= _CHUNK_BYTES:
                    written.append((key, tail + gained))
                    continue
                chunk = number_of(key)
                before = chunk * CHUNK + len(tail) // EVENT_BYTES
                if len(tail) == _CHUNK_BYTES:
                    chunk += 1
                else:
                    gained = tail + gained
        new += before == 0
        floor = max(0, before + length // EVENT_BYTES - history) // CHUNK
        for place in range(0, len(gained), _CHUNK_BYTES):
            if chunk >= floor:
                written.append((key_of(prefix, chunk), gained[place : place + _CHUNK_BYTES]))
            chunk += 1
        # Chunks may have left the last N events while the newest chunk filled up.
        for gone in range(max(0, before - CHUNK - history) // CHUNK, floor):
            passed.append(key_of(prefix, gone))
    cursor.putmulti(written)
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
    """A user's total number of events, from its chunks, newest first.

    >>> total_of([(key_of(prefix_of(7), 2), bytes(3 * EVENT_BYTES))])
    35
    """
    key, newest = chunks[0]
    return number_of(key) * CHUNK + len(newest) // EVENT_BYTES


def replace_all(cursor: lmdb.Cursor, prefix: bytes, events: Events, total: int) -> None:
    """Replaces a user's events by the last ones of `total`; without events the user is removed.

    If the newest chunk would lack its first events, its length would not give the total; then the total is lowered.
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
