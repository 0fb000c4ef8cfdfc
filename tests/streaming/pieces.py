"""Batches of events with windows, and contexts of a process, made up for the tests of this folder."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np

from state.events.parser import EventBatch
from state.features.arrays import Vector
from state.features.mask import Mask
from state.history.appends import Appends
from state.positions import Range, Source
from streaming.context import StreamContext
from streaming.rows import Rows

ZERO, ONE = Source("ab" * 16, 0), Source("ab" * 16, 1)


def context_of(**owned: Any) -> StreamContext:
    """What a process owns, as far as a test needs it."""
    calm = {
        "mask": Mask.NONE,
        "watch": SimpleNamespace(changed=lambda: False),
        "leaders": SimpleNamespace(note=lambda *_: None),
        "room": SimpleNamespace(wait_for=lambda act, what: act()),
    }
    return StreamContext(**dict.fromkeys(one.name for one in fields(StreamContext)) | calm | owned)


def piece(*parts: tuple[Source, int, int], dead: int = 0, appends: Appends | None = None) -> Rows:
    """A batch of (source, first offset, rows), each followed by `dead` dead offsets."""
    count = sum(rows for _, _, rows in parts)
    offset = np.concatenate([np.arange(first, first + rows) for _, first, rows in parts] or [np.zeros(0)]).astype(
        np.int64
    )
    number = np.repeat(np.arange(len(parts)), [rows for _, _, rows in parts]).astype(np.uint16)
    batch = EventBatch(
        user=offset.astype(np.uint64),
        item=np.zeros(count, np.uint64),
        category=np.zeros(count, np.uint64),
        action=np.zeros(count, np.uint8),
        at_ms=offset * 10,
        label=np.full(count, np.nan, np.float32),
        weight=np.ones(count, np.float32),
        context=np.zeros((count, 0), np.uint64),
        source=number,
        offset=offset,
        ranges=tuple(Range(source, first, first + rows + dead, rows=rows, dead=dead) for source, first, rows in parts),
        dead=(),
        names={},
    )
    rng = np.random.default_rng(count)
    return Rows(
        batch,
        Vector(
            features=rng.integers(0, 9, (count, 4)).astype(np.uint16),
            recent_categories=rng.integers(0, 9, (count, 2)).astype(np.uint64),
            category_windows=rng.integers(0, 9, (count, 2, 3)).astype(np.uint16),
            sequence_items=np.empty((count, 0), np.uint64),
            sequence_categories=np.empty((count, 0), np.uint64),
            sequence_actions=np.empty((count, 0), np.uint16),
            sequence_ages=np.empty((count, 0), np.uint16),
        ),
        appends=appends or Appends.none(),
    )
