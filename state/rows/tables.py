"""Tables of rows (those of every version, and a ranker's own with their program inputs), and the keys of stored rows.

The name of a ranker's own table has lowercase letters, digits and underscores. Its rows are inputs of a program, called
`<table>_of_<ids>`. So the signature of a program defines the rows that the runner looks up.

>>> own_input("attended", "sequence_items"), own_rows_of("attended_of_sequence_items")
('attended_of_sequence_items', ('attended', 'sequence_items'))

A key has the inverted version, so that the newest entry of a row sorts first:

    lane|table u8, id u64, ~version u64   (big-endian)

Number 7 is shared by all of a ranker's own tables: u32 of the name's hash precedes the id.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

TABLES = ("user", "item", "category", "context", "cross", "transition")
"""Tables of every version, in the order of their numbers in keys."""

ITEM_LISTS = ("clicked", "followed", "visited")
"""Tables of lists of items, see `state/ranking/item_lists.py`."""

COUNTED = ("transition", *ITEM_LISTS, "next_category")
"""Tables of counts, see `state/ranking`. A version of an earlier release may lack some of them, or have others."""

UNSERVED = frozenset({"visited"})
"""Tables that only the trainer reads; serving uses the users' histories instead."""

OPTIONAL = frozenset({"cross", *COUNTED})
"""Tables that a version may lack, or have in another form: they then start empty."""

ITEM_SCORE = "recommend."
"""Prefix of the tensors of the item score, see `state/ranking/item_scores.py`."""

INTEREST_SCORE = "interests."
"""Prefix of the tensors of the correction of interests, see `state/ranking/interest_scores.py`."""

TAKEN = frozenset({*TABLES, *COUNTED, "dense", "slots", "state", "popular", "churn", "recommend", "interests"})
"""Names that a ranker's own table may not have: other tensors in a version's files begin with them."""

OWN = 7
"""The number in keys of all rankers' own tables; the hash of the name distinguishes them."""

SERVED_IDS = (
    "user", "item", "category", "context", "item_attributes", "recent", "popular", "successor", "sequence_items",
    "sequence_categories", "sequence_actions",
)  # fmt: skip
"""The ids whose rows serving can look up in a ranker's own table."""

AVERAGED_IDS = frozenset({"context", "item_attributes", "negative_item_attributes"})
"""Ids whose rows are averaged, because the settings determine their number."""

_NAME = re.compile(r"[a-z][a-z0-9_]*")


class _Codes(dict[str, int]):
    """Code of each table by name: its number in keys. A ranker's own table has the name's 32-bit hash before `OWN`."""

    def __missing__(self, table: str) -> int:
        code = int.from_bytes(hashlib.sha256(table.encode()).digest()[:4], "big") << 3 | OWN
        self[table] = code
        return code


CODES = _Codes({name: number for number, name in enumerate(TABLES)})


def is_name(text: str) -> bool:
    """Whether a ranker's own table may have this name."""
    return _NAME.fullmatch(text) is not None and text not in TAKEN


def tables_in(tensors: Iterable[str]) -> tuple[str, ...]:
    """The tables of a version, from the names of its tensors: those of every version, then others by name.

    >>> tables_in(["item.ids", "attended.ids", "attended.rows", "state.popular.ids"])[len(TABLES):]
    ('attended',)
    """
    named = {name[:-4] for name in tensors if name.endswith(".ids")} - {*TABLES}
    return *TABLES, *sorted(name for name in named if name in COUNTED or is_name(name))


def own_input(table: str, ids: str) -> str:
    """The name of a program's input for the rows of `ids` in the ranker's own `table`."""
    return f"{table}_of_{ids}"


def own_rows_of(name: str) -> tuple[str, str] | None:
    """Parses the name of a program's input into table and ids; None for any other input."""
    table, _, ids = name.rpartition("_of_")
    return (table, ids) if ids in SERVED_IDS and is_name(table) else None


LANES = 32
VERSION_BYTES = 8
TOP = (1 << 64) - 1  # a key ends with this minus the version


def u64(number: int) -> bytes:
    """Encodes a number as in keys."""
    return number.to_bytes(8, "big")


def row_prefix(lane: int, table: int, identity: int) -> bytes:
    """The prefix of all keys of one row, without the version; `table` is one of `state.rows.tables.CODES`.

    >>> row_prefix(1, 2, 258).hex(), row_prefix(1, 5 << 3 | OWN, 258).hex()
    ('0a0000000000000102', '0f000000050000000000000102')
    """
    if table <= OWN:
        return ((lane << 3 | table) << 64 | identity).to_bytes(9, "big")
    return (((lane << 3 | OWN) << 32 | table >> 3) << 64 | identity).to_bytes(13, "big")


def version_of(key: bytes) -> int:
    """The version that wrote the entry under `key`."""
    return TOP - int.from_bytes(key[-VERSION_BYTES:], "big")


def lane_start(lane: int) -> bytes:
    """A key that sorts at or before every key of a lane, and after those of lower lanes."""
    return bytes([lane << 3])


def lane_of(key: bytes) -> int:
    """The lane of a key."""
    return key[0] >> 3


def row_keys(lane: int, table: int, ids: NDArray[np.uint64], version: int | NDArray[np.uint64]) -> NDArray[np.uint8]:
    """The stored keys of `[k]` uint64 ids at `version`, one or `[k]` uint64.

    They are `[k, 17]` uint8; `[k, 21]` for a ranker's own table.

    >>> row_keys(1, 2, np.array([258], np.uint64), 1).tobytes().hex()
    '0a0000000000000102fffffffffffffffe'
    """
    start = row_prefix(lane, table, 0)
    keys = np.empty((len(ids), len(start) + VERSION_BYTES), np.uint8)
    keys[:, : len(start)] = np.frombuffer(start, np.uint8)
    keys[:, len(start) - 8 : len(start)] = ids.astype(">u8").view(np.uint8).reshape(-1, 8)
    inverted = ~np.asarray(version, np.uint64).reshape(-1, 1)
    keys[:, len(start) :] = inverted.astype(">u8").view(np.uint8)
    return keys
