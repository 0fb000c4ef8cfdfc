"""Columns of micro-batches for tests that care about some of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from state.features.spec import FeatureSpec
from state.microbatch.batch import DTYPES, NAMES, SCALARS


def columns(rows: int, spec: FeatureSpec | None = None, **given: Any) -> dict[str, NDArray[Any]]:
    """All columns of `rows` rows, of which some are `given`. The others: offsets from 0 on, weights of 1, no label, zeros.

    Without a `spec` lists have two elements, and windows three.
    """
    features, recent, windows = 2, 2, 3
    if spec is not None:
        features, recent, windows = len(spec.names), spec.recent_categories, len(spec.window_names)
    shapes = {"features": (features,), "recent_categories": (recent,), "category_windows": (recent, windows)}
    made = {
        name: np.zeros((rows, *(() if name in SCALARS else shapes.get(name, (0,)))), DTYPES[name]) for name in NAMES
    }
    made |= {"offset": np.arange(rows), "label": np.full(rows, np.nan, np.float32), "weight": np.ones(rows, np.float32)}
    return made | {name: np.asarray(column, DTYPES[name]) for name, column in given.items()}
