"""Keys of stored rows: lane and table, id, and the inverted version, so that the newest entry sorts first.

lane|table u8, id u64, ~version u64   (big-endian)

Table 7 stands for a ranker's own tables: u32 of the name's hash precedes the id.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from state.rows.tables import OWN

LANES = 32
VERSION_BYTES = 8
TOP = (1 << 64) - 1  # a key ends with this minus the version


def u64(number: int) -> bytes:
    """Encodes a number as in keys."""
    return number.to_bytes(8, "big")


def stem(lane: int, table: int, identity: int) -> bytes:
    """The prefix of all keys of one row, without the version; `table` is one of `state.rows.tables.CODES`.

    >>> stem(1, 2, 258).hex(), stem(1, 5 << 3 | OWN, 258).hex()
    ('0a0000000000000102', '0f000000050000000000000102')
    """
    if table <= OWN:
        return ((lane << 3 | table) << 64 | identity).to_bytes(9, "big")
    return (((lane << 3 | OWN) << 32 | table >> 3) << 64 | identity).to_bytes(13, "big")


def version_of(key: bytes) -> int:
    """The version that wrote the entry under `key`.

    >>> version_of(row_keys(1, 2, np.array([258], np.uint64), 7).tobytes())
    7
    """
    return TOP - int.from_bytes(key[-VERSION_BYTES:], "big")


def lane_start(lane: int) -> bytes:
    """A key that sorts at or before every key of a lane, and after those of lower lanes."""
    return bytes([lane << 3])


def lane_of(key: bytes) -> int:
    """The lane of a key."""
    return key[0] >> 3


def row_keys(lane: int, table: int, ids: NDArray[np.uint64], version: int) -> NDArray[np.uint8]:
    """The stored keys of `ids` at `version`.

    Args:
        lane: Below 32.
        table: One of `state.rows.tables.CODES`.
        ids: `[k]` uint64.
        version: The version that wrote them.

    Returns:
        `[k, 17]` uint8, `[k, 21]` of a ranker's own table.

    >>> row_keys(1, 2, np.array([258], np.uint64), 1).tobytes().hex()
    '0a0000000000000102fffffffffffffffe'
    """
    start = stem(lane, table, 0)
    keys = np.empty((len(ids), len(start) + VERSION_BYTES), np.uint8)
    keys[:, : len(start)] = np.frombuffer(start, np.uint8)
    keys[:, len(start) - 8 : len(start)] = ids.astype(">u8").view(np.uint8).reshape(-1, 8)
    keys[:, len(start) :] = np.frombuffer(u64(TOP - version), np.uint8)
    return keys
