"""Batches of events with windows, and contexts of a process, made up for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
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

ZERO, ONE = SOURCES = Source("ab" * 16, 0), Source("ab" * 16, 1)


def context_of(**owned: Any) -> StreamContext:
    """What a process owns, as far as a test needs it."""
    calm = {
        "mask": Mask.NONE,
        "watch": SimpleNamespace(changed=lambda: False),
        "leaders": SimpleNamespace(note=lambda *_: None),
        "room": SimpleNamespace(wait_for=lambda act, what: act()),
    }
    parts: dict[str, Any] = dict.fromkeys(one.name for one in fields(StreamContext)) | calm | owned
    return StreamContext(**parts)


def batch_of(
    partitions: Sequence[int], following: list[int], absent: Sequence[bool] = (), **columns: Any
) -> EventBatch:
    """Events at the next offsets of `SOURCES`, which `following` keeps; nothing is at positions that are `absent`."""
    known, first, offsets, source = sorted(set(partitions)), list(following), list[int](), list[int]()
    for place, partition in enumerate(partitions):
        if not (absent and absent[place]):
            offsets.append(following[partition])
            source.append(known.index(partition))
        following[partition] += 1
    rows = [source.count(number) for number in range(len(known))]
    ranges = tuple(
        Range(SOURCES[one], first[one], following[one], rows=count, absent=following[one] - first[one] - count)
        for one, count in zip(known, rows, strict=True)
    )
    return events(
        len(offsets), source=np.array(source, np.uint16), offset=np.array(offsets, np.int64), ranges=ranges, **columns
    )


def events(count: int, **columns: Any) -> EventBatch:
    """A batch with these columns; the others are empty or 0."""
    kinds = {"user": np.uint64, "item": np.uint64, "category": np.uint64, "action": np.uint8, "at_ms": np.int64}
    plain: dict[str, Any] = {
        **{name: np.zeros(count, kind) for name, kind in kinds.items()},
        "label": np.full(count, np.nan, np.float32),
        "weight": np.ones(count, np.float32),
        "context": np.zeros((count, 0), np.uint64),
        "dead": (),
        "names": {},
    }
    typed = {name: np.array(column, kinds[name]) if name in kinds else column for name, column in columns.items()}
    return EventBatch(**plain | typed)


def piece(*parts: tuple[Source, int, int], dead: int = 0, appends: Appends | None = None) -> Rows:
    """A batch of (source, first offset, rows), each followed by `dead` dead offsets."""
    count = sum(rows for _, _, rows in parts)
    offset = np.array([at for _, first, rows in parts for at in range(first, first + rows)], np.int64)
    batch = events(
        count,
        user=offset,
        at_ms=offset * 10,
        source=np.repeat(np.arange(len(parts)), [rows for _, _, rows in parts]).astype(np.uint16),
        offset=offset,
        ranges=tuple(Range(source, first, first + rows + dead, rows=rows, dead=dead) for source, first, rows in parts),
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
