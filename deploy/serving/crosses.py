"""Computes the logits of feature crosses for user-item pairs from the rows of one version."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from state.ranking.crosses import WIDTH, Crosses, Values, logits_of
from state.rows.reader import RowReader, Served

F32 = NDArray[np.float32]

_NONE = bytes(4 * WIDTH)


def shares_of(reader: RowReader, served: Served, crosses: Crosses) -> F32:
    """Returns the scale of weights and margins, `[C, 2]` float32; `[0, 2]` if the version has none.

    A version has none if it has learned no label, or if its release has no crosses or other crosses.
    """
    if served.dims.get("cross") != WIDTH:
        return np.empty((0, WIDTH), np.float32)
    return reader.get("cross", crosses.shares.tolist(), served)[0]


def logits(reader: RowReader, served: Served, crosses: Crosses, shares: F32, pairs: Values) -> F32:
    """Returns the logits of n pairs, `[n]` float32; a cross without a row contributes nothing.

    Args:
        reader: The reader of the transaction.
        served: The version.
        crosses: The crosses, with the columns of the settings.
        shares: `[C, 2]` float32 from `shares_of`, not empty.
        pairs: The values to cross.
    """
    ids = crosses.ids(pairs)
    rows = [reader.row("cross", one, served) if one else None for one in ids.reshape(-1).tolist()]
    # Rows of another width come from a release with other crosses.
    numbers = b"".join(row if row and len(row) == len(_NONE) else _NONE for row in rows)
    return logits_of(np.frombuffer(numbers, np.float32).reshape(*ids.shape, WIDTH), shares)
