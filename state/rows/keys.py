"""The keys of stored rows: lane and table, id, and the version inverted, so that the newest entry comes first.

lane|table u8, id u64, ~version u64   (big-endian)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TABLES = ("user", "item", "category", "context", "cross", "transition")
PLACES = {name: place for place, name in enumerate(TABLES)}
LANES = 32
STEM_BYTES = 9  # of lane, table and id
KEY_BYTES = 17
TOP = (1 << 64) - 1  # less the version: what a key ends with


def u64(number: int) -> bytes:
    """A number as keys have it."""
    return number.to_bytes(8, "big")


def stem(lane: int, table: int, identity: int) -> bytes:
    """What the keys of one row begin with, whatever the version; `table` is an index into `TABLES`.

    >>> stem(1, 2, 258).hex()
    '0a0000000000000102'
    """
    return ((lane << 3 | table) << 64 | identity).to_bytes(STEM_BYTES, "big")


def version_of(key: bytes) -> int:
    """The version that wrote the entry under `key`.

    >>> version_of(row_keys(1, 2, np.array([258], np.uint64), 7).tobytes())
    7
    """
    return TOP - int.from_bytes(key[STEM_BYTES:], "big")


def lane_start(lane: int) -> bytes:
    """What is at or before each key of a lane, and after those of the lanes below."""
    return bytes([lane << 3])


def lane_of(key: bytes) -> int:
    """The lane of a key."""
    return key[0] >> 3


def row_keys(lane: int, table: int, ids: NDArray[np.uint64], version: int) -> NDArray[np.uint8]:
    """The stored keys of `ids` at `version`.

    Args:
        lane: Below 32.
        table: Index into `TABLES`.
        ids: `[k]` uint64.
        version: The version that wrote them.

    Returns:
        `[k, 17]` uint8.

    >>> row_keys(1, 2, np.array([258], np.uint64), 1).tobytes().hex()
    '0a0000000000000102fffffffffffffffe'
    """
    keys = np.empty((len(ids), KEY_BYTES), np.uint8)
    keys[:, 0] = lane << 3 | table
    keys[:, 1:STEM_BYTES] = ids.astype(">u8").view(np.uint8).reshape(-1, 8)
    keys[:, STEM_BYTES:] = np.frombuffer(u64(TOP - version), np.uint8)
    return keys
