"""Made-up micro-batches: the same number always gives the same batch."""

from __future__ import annotations

import numpy as np

from state.config.loading import load
from state.config.settings import Settings
from state.features.spec import FeatureSpec
from state.microbatch.batch import Header, MicroBatch
from state.microbatch.codec import decode, encode
from state.positions import Range, Source

TOPIC = "ab" * 16
SPEC = FeatureSpec()
SALT = "0123456789abcdef"
START_MS = 1_790_000_000_000
SMALL = ("--model.dim", "8", "--model.hidden", "16,8", "--model.popular", "4")


def small_settings(*flags: str) -> Settings:
    return load([*SMALL, *flags], {})


def microbatch(
    number: int, rows: int = 40, users: int = 30, step_ms: int = 150_000, spec: FeatureSpec = SPEC, salt: str = SALT
) -> bytes:
    """Batch `number` of a log: both partitions in turn, offsets following on, some ids new each time."""
    drawn = np.random.default_rng(number)
    half = rows // 2
    ranges = tuple(Range(Source(TOPIC, part), number * half, (number + 1) * half, rows=half) for part in (0, 1))
    category = drawn.integers(1, 12 + number // 4, rows).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    labels = np.zeros((rows, spec.recent_categories), np.uint64)
    labels[:, :3] = np.stack([np.roll(category, shift) for shift in (1, 2, 5)], 1)
    columns = {
        "user": (drawn.integers(1, users, rows) + number).astype(np.uint64) * np.uint64(0xBF58476D1CE4E5B9),
        "item": drawn.integers(1, 200, rows).astype(np.uint64) * np.uint64(0x94D049BB133111EB),
        "category": category,
        "action": drawn.integers(0, 4, rows).astype(np.uint8),
        "at_ms": START_MS + number * step_ms + np.arange(rows, dtype=np.int64),
        "label": np.where(drawn.random(rows) < 0.2, 1.0, np.nan).astype(np.float32),
        "weight": np.ones(rows, np.float32),
        "source": np.repeat(np.array([0, 1], np.uint16), half),
        "offset": np.tile(np.arange(number * half, (number + 1) * half, dtype=np.int64), 2),
        "context": np.zeros((rows, 0), np.uint64),
        "features": drawn.integers(0, 200, (rows, len(spec.names))).astype(np.uint16),
        "recent_categories": labels,
        "category_windows": drawn.integers(0, 50, (rows, spec.recent_categories, len(spec.window_names))).astype(
            np.uint16
        ),
        "user_attributes": np.empty((rows, 0), np.uint64),
        "item_attributes": np.empty((rows, 0), np.uint64),
    }
    return encode(Header(spec.digest, salt, ranges, created_ms=START_MS + number), columns)


def batches(first: int, last: int) -> list[MicroBatch]:
    return [decode(microbatch(number)) for number in range(first, last)]
