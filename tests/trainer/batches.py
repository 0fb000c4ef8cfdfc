"""Micro-batches made from a seed, for tests and benchmarks of the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from state.config.settings import Settings
from state.features.spec import FeatureSpec
from state.microbatch.batch import Header, MicroBatch
from state.positions import Range, Source
from state.ranking.crosses import Crosses
from trainer.engine import build
from trainer.engine.step import Trainer
from trainer.tables.id_table import IdTable
from trainer.tables.table import Table

SPEC = FeatureSpec()
SOURCE = Source("ab" * 16, 1)
START_MS = 1_700_000_000_000


def with_tables(settings: Settings, capacity: int, crosses_of_a_row: int = build.CROSSES_OF_A_ROW) -> Trainer:
    """A trainer in its first state, whose tables begin with `capacity` rows."""
    with mock.patch.multiple(build, CAPACITY=capacity, CROSSES_OF_A_ROW=crosses_of_a_row):
        return Trainer(settings, SPEC)


def rows_of(table: IdTable, places: NDArray[np.int32]) -> NDArray[np.float32]:
    """A copy of rows of a table of vectors, `[k, dim]` float32."""
    assert isinstance(table, Table)
    return table.gather(places)


def without_network(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a trainer without the share of the network, a row of the crosses that 0.1.0 does not have."""
    is_cross = state["cross.ids"] != Crosses(SPEC).shares[-1]
    by_cross = [name for name, value in state.items() if name.startswith("cross.") and len(value) == is_cross.size]
    return {**state, **{name: state[name][is_cross] for name in by_cross}}


def spread(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Small numbers as 64-bit ids; 0 stays 0."""
    return numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def micro_batch(
    rows: int,
    first: int = 0,
    seed: int = 0,
    users: int = 500,
    items: int = 5000,
    categories: int = 300,
    context: int = 0,
    at_ms: int = START_MS,
) -> MicroBatch:
    """A micro-batch of `rows` rows from offset `first`, whose clicks often repeat one of the user's labels."""
    rng = np.random.default_rng([seed, first])
    labels = spread(rng.zipf(1.3, (rows, SPEC.recent_categories)) % categories + 1)
    labels[np.arange(SPEC.recent_categories) >= rng.integers(0, SPEC.recent_categories + 1, rows)[:, None]] = 0
    repeated = labels[np.arange(rows), rng.integers(0, 4, rows)]
    category = np.where(repeated != 0, repeated, spread(rng.zipf(1.3, rows) % categories + 1))
    return MicroBatch(
        Header(SPEC.digest, "0" * 16, (Range(SOURCE, first, first + rows, rows=rows),), 0),
        user=spread(rng.integers(1, users, rows)),
        item=spread(rng.zipf(1.2, rows) % items + 1),
        category=category,
        action=rng.integers(0, 4, rows).astype(np.uint8),
        at_ms=at_ms + np.arange(first, first + rows, dtype=np.int64),
        label=np.full(rows, np.nan, np.float32),
        weight=np.ones(rows, np.float32),
        source=np.zeros(rows, np.uint16),
        offset=np.arange(first, first + rows, dtype=np.int64),
        context=spread(rng.integers(1, 9, (rows, context))),
        features=rng.integers(0, 300, (rows, len(SPEC.names))).astype(np.uint16),
        recent_categories=labels,
        category_windows=rng.integers(0, 200, (rows, SPEC.recent_categories, len(SPEC.window_names))).astype(np.uint16),
    )
