"""The preprocessing of the compiled engine: `[B, D]` uint16 features to `[B, D']` float32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from state.compiled import compiled, read_only
from trainer.engine.compiled.arrays import F32, U16
from trainer.engine.compiled.window_net import LOGARITHMS
from trainer.model.default_model import feature_scaling
from trainer.model.model import Analysed, Preprocessing

Prepare = Callable[[U16], F32]

VALUES = np.arange(1 << 16, dtype=np.uint16)[:, None]
"""All values of a feature, `[65536, 1]`."""


def prepared_on_host(preprocessing: Preprocessing | Analysed | None, names: tuple[str, ...]) -> Prepare | None:
    """The preprocessing of the features `names` by a table, if no graph is needed to make it.

    Logarithms and the default preprocessing transform each feature independently, and a feature has 65,536 values. So
    all values are computed once, which is faster than a call of a graph in each update.

    Args:
        preprocessing: None takes logarithms.
        names: The D features.

    Returns:
        None if only the graph of `preprocessing` knows the values.
    """
    if preprocessing is None:
        log_scale, scale, _ = feature_scaling(names)
        return by_table(LOGARITHMS[:, None] * log_scale + VALUES.astype(np.float32) * scale)
    table = preprocessing.table.load() if isinstance(preprocessing, Analysed) else None
    return None if table is None else by_table(table)


def by_table(table: F32) -> Prepare:
    """Looks up features in `[65536, D]` float32, the value of each feature for each raw integer."""

    def look_up(raw: U16) -> F32:
        features = np.empty(raw.shape, np.float32)
        _look_up(read_only(raw), table, features)
        return features

    return look_up


@compiled("const(u2[:, ::1]), f4[:, ::1], f4[:, ::1]")
def _look_up(raw: U16, table: F32, out: F32) -> None:
    for b in range(raw.shape[0]):
        for d in range(raw.shape[1]):
            out[b, d] = table[raw[b, d], d]
