"""Packs lists of transitions into float32 rows, the format of versions and of serving's row store.

A list is a row of the table `transition`, float32 like the rows of every table.
All values are whole numbers below 2^24, and an id takes three of them.

    count x FOLLOWERS | bits 42.. of the id x FOLLOWERS | bits 21..41 | bits 0..20

Slots behind a list's end hold zeros. Their signs carry no information, but they
exist: a new row holds numbers between -1 and 1 times 0, like an embedding that
is initialised with zero. Digests and `verify` compare bits, so the trainer
keeps the signs next to its lists.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from state.compiled import compiled
from state.ranking.transitions import FOLLOWERS, I32, Lists

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

WIDTH = 4 * FOLLOWERS
"""Width of a row."""

SIGN_BYTES = WIDTH // 8
"""Bytes of the signs of a row's zeros, a bit for each value."""

_PART = np.uint64((1 << 21) - 1)


@compiled("Lists, u1[:, ::1], f4[:, ::1]")
def _pack(lists: Lists, signs: U8, rows: F32) -> None:
    for i in range(rows.shape[0]):
        for k in range(FOLLOWERS):
            count, category = lists.counts[i, k], lists.ids[i, k]
            if count == 0:
                for place in range(k, WIDTH, FOLLOWERS):
                    negative = (signs[i, place >> 3] >> (7 - (place & 7))) & 1
                    rows[i, place] = np.float32(-0.0) if negative else np.float32(0.0)
                continue
            rows[i, k] = count
            rows[i, FOLLOWERS + k] = np.float32(category >> np.uint64(42))
            rows[i, 2 * FOLLOWERS + k] = np.float32((category >> np.uint64(21)) & _PART)
            rows[i, 3 * FOLLOWERS + k] = np.float32(category & _PART)


def pack(lists: Lists, signs: U8) -> F32:
    """Packs lists into rows.

    Args:
        lists: n lists.
        signs: `[n, SIGN_BYTES]` uint8, from `signs_of`.

    Returns:
        `[n, WIDTH]` float32.

    >>> lists = Lists.empty(1)
    >>> lists.counts[0, 0], lists.ids[0, 0] = 9, (3 << 42) + (2 << 21) + 1
    >>> rows = pack(lists, np.full((1, SIGN_BYTES), 255, np.uint8))
    >>> rows[0, ::FOLLOWERS].tolist(), rows[0, 1::FOLLOWERS].tolist()
    ([9.0, 3.0, 2.0, 1.0], [-0.0, -0.0, -0.0, -0.0])
    >>> bool(unpack(rows).ids[0, 0] == lists.ids[0, 0])
    True
    """
    rows = np.empty((len(lists.counts), WIDTH), np.float32)
    _pack(lists, signs, rows)
    return rows


def signs_of(rows: F32) -> U8:
    """The signs of the values of `[n, WIDTH]` rows, `[n, SIGN_BYTES]` uint8. Only zeros may be negative."""
    return np.packbits(np.signbit(rows), axis=1)


@compiled("f4[:, ::1], Lists")
def _unpack(rows: F32, lists: Lists) -> None:
    for i in range(rows.shape[0]):
        for k in range(FOLLOWERS):
            high, middle = np.uint64(rows[i, FOLLOWERS + k]), np.uint64(rows[i, 2 * FOLLOWERS + k])
            lists.counts[i, k] = np.int32(rows[i, k])
            lists.ids[i, k] = (
                (high << np.uint64(42)) | (middle << np.uint64(21)) | np.uint64(rows[i, 3 * FOLLOWERS + k])
            )


def unpack(rows: F32) -> Lists:
    """Unpacks `[n, WIDTH]` float32 rows into lists."""
    lists = Lists.empty(len(rows))
    _unpack(np.ascontiguousarray(rows), lists)
    return lists


def from_stored(stored: Sequence[bytes | None]) -> tuple[I32, Lists]:
    """Unpacks the lists of n categories that were read from the row store.

    Args:
        stored: The bytes of each row, None where the version has none. A row of another width, from a release with
            other lists, counts as None.

    Returns:
        `[n]` int32, the index of each category's list, 0 for none; and the lists. List 0 is that of no category.

    >>> at, lists = from_stored([None, np.ones(WIDTH, "<f4").tobytes(), b"1234"])
    >>> at.tolist(), lists.counts[:, 0].tolist()
    ([0, 1, 0], [0, 1])
    """
    fitting = [place for place, row in enumerate(stored) if row is not None and len(row) == 4 * WIDTH]
    at = np.zeros(len(stored), np.int32)
    at[fitting] = np.arange(1, 1 + len(fitting))
    rows = np.zeros((1 + len(fitting), WIDTH), np.float32)
    rows[1:] = np.frombuffer(b"".join(stored[place] or b"" for place in fitting), "<f4").reshape(-1, WIDTH)
    return at, unpack(rows)
