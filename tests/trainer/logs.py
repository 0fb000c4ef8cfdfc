"""A training log in memory, and a learner over it: what the trainer does without Kafka and processes."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from prometheus_client import CollectorRegistry

from state.errors import GapError
from state.features.mask import Mask
from state.log import PartitionBatch
from state.log.gaps import Consent
from state.metrics import TrainerMetrics
from state.microbatch.batch import Header
from state.microbatch.codec import decode, encode
from state.positions import Gap, Source
from state.registry.control import start
from state.registry.registry import Registry
from tests.trainer.clicks import SALT, SPEC, small_settings
from trainer.engine.step import Trainer
from trainer.learner import NO_CONSENT, Learner

ABOUT: dict[str, Any] = {"salt": SALT, "popular": [["00000000000000ff", 3]], "newest_ms": 1_790_000_000_000}


class MemoryLog:
    """Records at even offsets, as transactions leave them; offset `begin` is the first kept, and may move on."""

    def __init__(self, values: list[bytes], topic_id: str = "cd" * 16, begin: int = 0) -> None:
        self.values, self.topic_id, self.begin = values, topic_id, begin
        self._at = begin
        self.origin: MemoryLog | None = None

    def _gap(self, offset: int) -> GapError:
        begin = (self.origin or self).begin
        gap = Gap(Source(self.topic_id, 0), offset, begin)
        return GapError(f"we were at {offset}, the log begins at {begin}", gap)

    def at(self, offset: int | None) -> MemoryLog:
        if offset is not None and offset < self.begin:
            raise self._gap(offset)
        opened = MemoryLog(self.values, self.topic_id, self.begin)
        opened.origin = self.origin or self
        opened._at = self.begin if offset is None else offset
        return opened

    def poll(self, timeout_s: float, max_records: int) -> list[PartitionBatch]:
        first = self._at
        if first < (self.origin or self).begin:
            raise self._gap(first)
        offsets = [2 * index for index in range((first + 1) // 2, len(self.values))][:max_records]
        if first >= 2 * len(self.values):
            return []
        # The last marker may be all that is left.
        self._at = offsets[-1] + 2 if offsets else 2 * len(self.values)
        values: list[bytes | None] = [self.values[offset // 2] for offset in offsets]
        stamps = np.zeros(len(offsets), np.int64)
        return [
            PartitionBatch(
                self.topic_id, 0, first, self._at, np.array(offsets, np.int64), stamps, [None] * len(offsets), values
            )
        ]

    def position(self, partition: int) -> int:
        return self._at

    def seek(self, partition: int, offset: int) -> None:
        self._at = offset

    def lag(self) -> dict[int, int]:
        return {0: 2 * len(self.values) - self._at}

    def close(self) -> None:
        pass


def started(path: Path) -> Registry:
    registry = Registry(path)
    if registry.control() is None:
        registry.propose(start(actor="test", reason="test", now_ms=0))
    return registry


@functools.cache
def shared(lane: int, *flags: str) -> Trainer:
    """A trainer traced once for many tests; entering an epoch clears whatever it learned."""
    return Trainer(small_settings(*flags), SPEC)


def learner(
    registry: Registry, log: MemoryLog, *flags: str, trainer: Trainer | None = None, consent: Consent = NO_CONSENT
) -> Learner:
    """A learner in control's epoch; it publishes at every look unless flags say otherwise."""
    settings = small_settings("--trainer.publish_s", "0.01", *flags)
    ticks = iter(range(10**9))
    made = Learner(
        settings,
        registry,
        trainer or shared(0),
        log.at,
        "program",
        SPEC.digest,
        ABOUT,
        TrainerMetrics(CollectorRegistry()),
        clock=lambda: 0.0,
        elapsed=lambda: float(next(ticks)),
        consent=consent,
    )
    control = registry.control()
    assert control is not None
    made.enter(control)
    return made


def run_to_end(running: Learner) -> None:
    running.caught_up = False
    while not running.caught_up and not running._trainer.guard.held:
        running.tick(0.0)


def without(value: bytes, mask: Mask) -> bytes:
    """The record as it were, had the stream left out the masked rows."""
    batch = decode(value)
    hidden = mask.rows(batch.user, batch.at_ms, batch.source, batch.offset, batch.header.ranges)
    gone = np.bincount(batch.source[hidden], minlength=len(batch.header.ranges)).tolist()
    ranges = tuple(
        replace(part, rows=part.rows - count, filtered=part.filtered + count)
        for part, count in zip(batch.header.ranges, gone, strict=True)
    )
    header = Header(batch.header.spec, batch.header.salt, ranges, batch.header.created_ms)
    return encode(header, batch.take(~hidden).columns)


def with_weight(value: bytes, weight: float) -> bytes:
    batch = decode(value)
    return encode(batch.header, batch.columns | {"weight": np.full(len(batch), weight, np.float32)})


def write_transform(folder: Path) -> None:
    """A transform graph as the bootstrap leaves one, without its ten seconds of analysis."""

    class Transform(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = tf.Variable(tf.fill([len(SPEC.names)], 2.0))

        @tf.function(input_signature=[{"features": tf.TensorSpec([None, len(SPEC.names)], tf.float32)}])
        def transform_fn(self, inputs: Any) -> Any:
            return {"features": tf.math.log1p(inputs["features"]) - self.mean}

    tf.saved_model.save(Transform(), str(folder / "transform" / "transform_fn"))
