"""A training log in memory, and a learner over it: what the trainer does without Kafka and processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from prometheus_client import CollectorRegistry

from state.config.sections import Kafka
from state.features.mask import ClickColumns, Mask
from state.features.spec import FeatureSpec
from state.log import Log
from state.log.accepted_gaps import Consent
from state.metrics import TrainerMetrics
from state.microbatch.batch import Header
from state.microbatch.codec import decode, encode
from state.process.environment import Clocks
from state.registry.control import start
from state.registry.manifest import Draft, Kind, LogRange
from state.registry.registry import Registry
from state.storage import Room
from tests.memory_log import MemoryLog
from tests.trainer.clicks import SALT, SPEC, small_settings
from trainer.beginning import Begins, from_nothing
from trainer.engine.step import Trainer
from trainer.learner import NO_CONSENT, Learner, Surroundings
from trainer.publications import ServedModel
from trainer.versions import checkpoint, content

TOPIC_ID = "cd" * 16
LOG = Kafka().microbatches_topic
ABOUT: dict[str, Any] = {"salt": SALT, "popular": [["00000000000000ff", 3]], "newest_ms": 1_790_000_000_000}


def written(records: Sequence[bytes], topic_id: str = TOPIC_ID, begin: int = 0) -> MemoryLog:
    """A training log of the topic `LOG`: a record at each even offset, the marker of its transaction behind it."""
    log = MemoryLog(ids=lambda: topic_id)
    log.topics().ensure(LOG, 1)
    append(log, records)
    log.topics().delete_before(LOG, {0: begin})
    return log


def append(log: Log, records: Sequence[bytes], topic: str = LOG) -> None:
    with log.writer("stream") as writer:
        for value in records:
            with writer.transaction():
                writer.send(topic, 0, None, value)


def started(path: Path) -> Registry:
    registry = Registry(path)
    if registry.control() is None:
        registry.propose(start(actor="test", reason="test", now_ms=0))
    return registry


def draft(parent: int | None, **changes: Any) -> Draft:
    kind: Kind = "base" if parent is None else "delta"
    return replace(Draft(kind, 1, parent, LogRange(), (), 0, 0, 0, 0, SPEC.digest, "", ""), **changes)


def publish(registry: Registry, trainer: Trainer, parent: int | None, **changes: Any) -> int:
    """Publishes what a trainer learned since `parent`, or all; returns the version."""
    tensors = checkpoint.full(trainer) if parent is None else checkpoint.changes(trainer)
    return registry.publish(draft(parent, **changes), content.encode(tensors)).version


def fresh(*flags: str) -> Trainer:
    """A small trainer that has learned nothing."""
    return Trainer(small_settings(*flags), SPEC)


def learner(
    registry: Registry,
    log: Log,
    *flags: str,
    trainer: Trainer | None = None,
    consent: Consent = NO_CONSENT,
    about: Mapping[str, Any] = ABOUT,
    program: str = "program",
    room: Room | None = None,
    spec: FeatureSpec = SPEC,
    begins: Begins = from_nothing,
    tick_s: float = 1.0,
    recent_s: float = 3600.0,
) -> Learner:
    """A learner in control's epoch; it publishes at every look, a durable version, unless flags say otherwise.

    Each reading of its clock is `tick_s` later than the one before.
    """
    pace = ("--trainer.publish_s", "0.01", "--registry.durable_s", "0.01")
    settings = small_settings(*pace, *flags)
    ticks, trainer = iter(range(10**9)), trainer or fresh(*flags)
    made = Learner(
        settings,
        registry,
        trainer,
        log,
        ServedModel(program, spec.digest, about, checkpoint.environment(settings, trainer.device, trainer.engine.name)),
        TrainerMetrics(CollectorRegistry()),
        Surroundings(consent, room, begins, recent_s, Clocks(lambda: 0.0, lambda: tick_s * next(ticks))),
    )
    control = registry.control()
    assert control is not None
    made.enter(control)
    return made


def run_to_end(running: Learner) -> None:
    running.caught_up = False
    while not (running.caught_up or trainer_of(running).guard.held or running.control.held):
        running.tick(0.0)


def trainer_of(running: Learner) -> Trainer:
    """What a learner steps; nobody else looks at it while it runs."""
    return running._trainer


def bits_of(running: Learner) -> str:
    """A digest of all that a learner has learned."""
    return checkpoint.digest(trainer_of(running))


def account_in(running: Learner) -> dict[str, int]:
    return running._account()


def settle(running: Learner) -> None:
    """Returns when the version that is being written is there."""
    running._settle(wait=True)


def kill(running: Learner) -> None:
    """As kill -9 does: what was not published is lost."""
    running._publisher.close()


def publish_all(running: Learner) -> int:
    """Runs to the end and until a durable version has all of it, however long publishing takes; returns that version."""
    run_to_end(running)
    settle(running)
    while running.place.unsaved:
        running.tick(0.0)
        settle(running)
    return running.place.parent


def without(value: bytes, mask: Mask) -> bytes:
    """The record as it were, had the stream left out the masked rows."""
    batch = decode(value)
    clicks = ClickColumns.of(batch)
    hidden = mask.rows(clicks, batch.header.ranges)
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
