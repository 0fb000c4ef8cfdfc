"""The parts of a golden run: the stream as a process, the trainer and the applier in this one, and what they wrote to Kafka."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from kafka import KafkaConsumer, TopicPartition
from prometheus_client import CollectorRegistry

from deploy.serving.answers.host import CAUGHT_UP_EXTRA
from deploy.serving.applier import FETCH_S, Applier
from state.config.sections import Kafka
from state.config.settings import Settings
from state.features.spec import FeatureSpec
from state.history.store import HistoryStore
from state.layout import HISTORIES
from state.log import Log, Topics, client_options
from state.metrics import TrainerMetrics
from state.microbatch.codec import decode
from state.registry.control import start
from state.registry.registry import Registry
from tests.golden.archive import (
    Topic,
)
from tests.golden.learning import new_trainer
from tests.streaming.streams import following, next_offsets, running, until
from trainer.learner import Learner, ServedModel, Surroundings
from trainer.versions.program import build


def stream(settings: Settings, log: Path) -> None:
    """Runs the stream process until all clicks are in the training log."""
    kafka = settings.kafka
    with Topics(kafka) as topics:
        ends = {partition: after for partition, (_, after) in topics.ends(kafka.clicks_topic).items()}
    with running(settings, log) as process, following(kafka, kafka.microbatches_topic) as written:
        until(lambda: next_offsets(written.poll()) == ends, f"all clicks in the log: {process.lines[-3:]}")
        if process.stop() != 0:
            raise RuntimeError(f"the stream failed: {process.lines[-3:]}")


def records_of(kafka: Kafka, name: str) -> Topic:
    """All committed records of a topic, read with the plain client for the sake of their headers."""
    with Topics(kafka) as topics:
        topic_id, ends = topics.describe(name).topic_id, topics.ends(name)
    consumer = KafkaConsumer(**client_options(kafka), isolation_level="read_committed", auto_offset_reset="earliest")
    partitions = [TopicPartition(name, number) for number in ends]
    found = []
    try:
        consumer.assign(partitions)
        consumer.seek_to_beginning()
        while any(consumer.position(one) < ends[one.partition][1] for one in partitions):
            for records in consumer.poll(timeout_ms=100).values():
                found += [
                    {
                        "partition": one.partition,
                        "offset": one.offset,
                        "timestamp_ms": one.timestamp,
                        "key": one.key,
                        "headers": list(one.headers),
                        "value": one.value,
                    }
                    for one in records
                ]
    finally:
        consumer.close(autocommit=False)
    return Topic(name, topic_id, ends, sorted(found, key=lambda one: (one["partition"], one["offset"])))


class Training:
    """The trainer of a run, started anew for each version: a stop publishes what is left, a start goes on from there."""

    def __init__(self, settings: Settings, registry: Registry, now_ms: int) -> None:
        self._settings, self.registry, self._now_ms = settings, registry, now_ms
        self.trainer = new_trainer(settings, registry)
        self._program = registry.specs.add_program(build(self.trainer.model))
        self._spec = FeatureSpec.from_settings(settings).digest
        if registry.control() is None:
            registry.propose(start(actor="golden", reason="first start", now_ms=now_ms))

    def version(self, records: int) -> int:
        """Learns so many records and publishes; returns the version."""
        learner = Learner(
            self._settings,
            self.registry,
            self.trainer,
            Log(self._settings.kafka),
            ServedModel(self._program, self._spec, self.registry.specs.spec(self._spec)),
            TrainerMetrics(CollectorRegistry()),
            Surroundings(clock=lambda: self._now_ms / 1000, elapsed=lambda: 0.0),
        )
        control = self.registry.control()
        assert control is not None
        learner.enter(control)
        end_s = time.monotonic() + 60
        while records:
            records -= learner.tick(0.1, stopping=lambda: True)
            assert time.monotonic() < end_s, "the training log is too short"
        learner.close()
        return learner.place.parent


def serve(settings: Settings, version: int, topics: Mapping[str, Topic], now_ms: int) -> None:
    """Runs the applier until it has all clicks and attributes, and answers with `version`."""
    collected, stop = CollectorRegistry(), threading.Event()
    log = topics["microbatches"]
    newest_ms = max(int(decode(one["value"]).at_ms.max()) for one in log.records)
    sides = {"user": topics.get("users"), "item": topics.get("items")}
    known = {side: living(topic) for side, topic in sides.items() if topic is not None}
    applier = Applier(settings, collected, stop, now_ms=lambda: now_ms)

    def there() -> bool:
        prefix = "springtide_serving_"
        counts = {side: collected.get_sample_value(f"{prefix}attributes_known", {"side": side}) for side in known}
        return (
            collected.get_sample_value(f"{prefix}version") == version
            and counts == known
            and applier.clicks.connected
            and applier.clicks.newest_ms == newest_ms
        )

    thread = threading.Thread(target=applier.run)
    thread.start()
    try:
        until(there, f"version {version} is not served with all clicks and {known} attributes")
        # A poll that finds nothing more marks the histories as complete.
        threading.Event().wait(3 * FETCH_S)
    finally:
        stop.set()
        thread.join()
    store = HistoryStore(settings.serving_dir / HISTORIES, settings.features.history, 1 << 30, readonly=True)
    position, complete = store.extra("microbatches"), store.extra(CAUGHT_UP_EXTRA)
    store.close()
    if complete is None or json.loads(position or b"{}")["next"] != {"0": log.ends[0][1]}:
        raise RuntimeError(f"serving's histories stopped at {position!r}")


def living(topic: Topic) -> int:
    """The keys of a compacted topic whose newest record has a value."""
    newest = {one["key"]: one["value"] for one in topic.records}
    return sum(value is not None for value in newest.values())
