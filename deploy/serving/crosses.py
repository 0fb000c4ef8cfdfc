"""What crosses say of pairs of a user and an item, out of the rows of one version."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from state.ranking.crosses import WIDTH, Crosses, Values, logits_of
from state.rows.reader import RowReader
from state.rows.served import Served

F32 = NDArray[np.float32]

_NONE = bytes(4 * WIDTH)


def shares_of(reader: RowReader, served: Served, crosses: Crosses) -> F32:
    """How much weights and margins count, `[C, 2]` float32; `[0, 2]` where the version has none.

    That is one that has learned no label, or of a release without crosses or with others.
    """
    if served.dims.get("cross") != WIDTH:
        return np.empty((0, WIDTH), np.float32)
    return reader.get("cross", crosses.shares.tolist(), served)[0]


def logits(reader: RowReader, served: Served, crosses: Crosses, shares: F32, pairs: Values) -> F32:
    """`[n]` float32 of n pairs; a cross without a row says nothing.

    Args:
        reader: Of the transaction.
        served: The version.
        crosses: With the columns of the settings.
        shares: `[C, 2]` float32 of `shares_of`, not empty.
        pairs: What of them is crossed.
    """
    ids = crosses.ids(pairs)
    rows = [reader.row("cross", one, served) if one else None for one in ids.reshape(-1).tolist()]
    # Rows of another width were written by a release with other crosses.
    numbers = b"".join(row if row and len(row) == len(_NONE) else _NONE for row in rows)
    return logits_of(np.frombuffer(numbers, np.float32).reshape(*ids.shape, WIDTH), shares)
