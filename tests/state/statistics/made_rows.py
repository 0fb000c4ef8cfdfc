"""Rows for statistics: columns of a micro-batch, drawn from distributions that are known."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from state.attributes.values import AttributeTable
from state.events.identity import public_id
from state.microbatch.batch import absent_column
from state.statistics.collecting import Statistics

ACTIONS = ("view", "cart")
NAMES = ("view.count_1h", "gap.1", "last.same_label")
CONTEXT = ("device",)
ATTRIBUTES = (("age_band",), ("brand",))
AGES = AttributeTable("user", ())
CATEGORIES = np.array([public_id(f"c{number}") for number in range(20)], np.uint64)


def columns(rows: int, seed: int = 0, hot: float = 0.0, known: float = 1.0, scale: float = 1.0) -> dict[str, Any]:
    """So many rows of 50 users."""
    drawn = np.random.default_rng(seed)
    category: NDArray[np.uint64] = CATEGORIES[drawn.zipf(1.6, rows) % len(CATEGORIES)]
    category[drawn.random(rows) < hot] = CATEGORIES[0]
    ages = np.array([public_id("user:age_band=18-24"), public_id("user:age_band=25-34")], np.uint64)
    age = ages[drawn.integers(2, size=rows)]
    lacking = np.array([AGES.unknown_id("age_band"), AGES.none_id("age_band")], np.uint64)
    age = np.where(drawn.random(rows) < known, age, lacking[drawn.integers(2, size=rows)])
    counts = drawn.poisson(9, rows) * scale
    return {
        "user": drawn.integers(1, 51, rows).astype(np.uint64),
        "item": drawn.integers(1, 300, rows).astype(np.uint64),
        "category": category,
        "action": (drawn.random(rows) < 0.2).astype(np.uint8),
        "label": np.where(drawn.random(rows) < 0.5, np.nan, drawn.random(rows)).astype(np.float32),
        "kind": absent_column("kind", rows),
        "delay_ms": absent_column("delay_ms", rows),
        "context": np.full((rows, 1), public_id("device=phone"), np.uint64),
        "features": np.stack([counts, drawn.integers(0, 256, rows), drawn.integers(0, 2, rows)], axis=1).astype(
            np.uint16
        ),
        "user_attributes": age.reshape(-1, 1),
        "item_attributes": np.full((rows, 1), public_id("item:brand=acme"), np.uint64),
    }


def statistics(*parts: dict[str, Any]) -> Statistics:
    """What was counted of parts of rows, one after the other."""
    made = Statistics(ACTIONS, NAMES, CONTEXT)
    for one in parts:
        made.add(one, ATTRIBUTES)
    return made
