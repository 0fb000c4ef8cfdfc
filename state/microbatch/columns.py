"""The columns of a micro-batch: their names, types and order, and their default content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Order and types define the format: a change needs a new FORMAT and a golden file.
SCALARS: dict[str, np.dtype[Any]] = {
    "user": np.dtype("<u8"),
    "item": np.dtype("<u8"),
    "category": np.dtype("<u8"),
    "action": np.dtype("u1"),
    "at_ms": np.dtype("<i8"),
    "label": np.dtype("<f4"),
    "weight": np.dtype("<f4"),
    "source": np.dtype("<u2"),
    "offset": np.dtype("<i8"),
    "kind": np.dtype("u1"),
    "waited": np.dtype("<i8"),
    "delay_ms": np.dtype("<i8"),
    "request": np.dtype("<u8"),
}
SINCE_2 = ("kind", "waited", "delay_ms", "request")  # all 0 in a row whose label did not wait
LISTS: dict[str, np.dtype[Any]] = {
    "context": np.dtype("<u8"),
    "features": np.dtype("<u2"),
    "recent_categories": np.dtype("<u8"),
    "category_windows": np.dtype("<u2"),
    "user_attributes": np.dtype("<u8"),
    "item_attributes": np.dtype("<u8"),
}
SEQUENCES: dict[str, np.dtype[Any]] = {
    "sequence_items": np.dtype("<u8"),
    "sequence_categories": np.dtype("<u8"),
    "sequence_actions": np.dtype("<u2"),
    "sequence_ages": np.dtype("<u2"),
}  # present only if the feature spec asks for them; see `state/features/kernel.py`
NAMES = (*SCALARS, *LISTS)
KINDS = {**SCALARS, **LISTS, **SEQUENCES}
WRITTEN = {
    "recent_categories": "labels",
    "category_windows": "label_windows",
}  # names in the encoded formats, where they differ
ATTRIBUTES = ("user_attributes", "item_attributes")  # missing in a micro-batch of format 1

Columns = Mapping[str, NDArray[Any]]


def absent_column(name: str, rows: int) -> NDArray[Any]:
    """The content of a column that is missing: zeros, or `[rows, 0]` for attributes and sequences."""
    return np.zeros(rows, KINDS[name]) if name in SCALARS else np.empty((rows, 0), KINDS[name])
