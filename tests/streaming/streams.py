"""Real stream processes and what they wrote, for the tests of this folder."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from kafka import KafkaConsumer, TopicPartition

from state.config.sections import Kafka, Paths, Stream
from state.config.settings import Settings
from state.history.store import HistoryStore
from state.layout import HISTORIES
from state.log import PartitionBatch, Reader, Topics, Writer, client_options
from state.microbatch.batch import NAMES, MicroBatch, trim
from state.microbatch.codec import decode
from state.positions import Source
from tests import forked

DEADLINE_S = 300.0
# The clicks are old, so that the broker would soon delete them.
FOREVER = {"retention.ms": "-1"}
BEGIN_MS = 1_700_000_000_000


def until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Returns when `condition` holds; fails with `what` at the deadline."""
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, f"not within {deadline_s:g} s: {what}"
        threading.Event().wait(0.05)


def settings_for(kafka: Kafka, state: Path, salt: Path, **stream: Any) -> Settings:
    """Settings with small batches, so that a few hundred clicks take many commits."""
    small = replace(Stream(cut_ms=20, cut_rows=25, metrics_port=0), **stream)
    return Settings(kafka=kafka, paths=Paths(state=str(state), salt_file=str(salt)), stream=small)


def click(number: int, **changes: object) -> bytes:
    """A click of one of 17 users."""
    fields: dict[str, object] = {
        "user": f"user-{number % 17}",
        "item": f"item-{number % 41}",
        "category": f"category-{number % 7}",
        "action": ("view", "view", "cart", "purchase")[number % 4],
        "time": BEGIN_MS + number * 1000,
    }
    return json.dumps({name: value for name, value in (fields | changes).items() if value is not None}).encode()


def send(
    kafka: Kafka, values: Sequence[bytes], first: int = 0, partition: Callable[[int], int] = lambda number: number % 2
) -> None:
    """Writes clicks, acknowledged; numbered from `first` on, partition by number."""
    with Writer(kafka) as writer:
        for number, value in enumerate(values, first):
            key = f"user-{number % 17}".encode()
            writer.send(kafka.clicks_topic, partition(number), key, value, (), BEGIN_MS + number * 1000)
        writer.flush()


class StreamProcess:
    """A running stream process, whose standard error goes to `log`; `kill_at` names the kill point that is armed."""

    def __init__(self, settings: Settings, log: Path, kill_at: str = "", arguments: Sequence[str] = ()) -> None:
        self.log = log
        env = {**os.environ, **settings.environment(), "SPRINGTIDE_KILL_AT": kill_at}
        if not kill_at:
            del env["SPRINGTIDE_KILL_AT"]
        with log.open("ab") as errors:
            command = [sys.executable, "-m", "streaming.pipeline", *arguments]
            self.process = forked.Popen(command, env=env, stderr=errors)

    def wait(self) -> int:
        """The exit code."""
        return self.process.wait(DEADLINE_S)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signals the process and returns its exit code."""
        self.process.send_signal(number)
        return self.wait()

    @property
    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()


@contextmanager
def running(settings: Settings, log: Path, kill_at: str = "", arguments: Sequence[str] = ()) -> Iterator[StreamProcess]:
    """A stream process that does not outlive the block."""
    stream = StreamProcess(settings, log, kill_at, arguments)
    try:
        yield stream
    finally:
        if stream.process.poll() is None:
            stream.process.kill()
        stream.process.wait(DEADLINE_S)


class Follower:
    """Reads a topic, which may not exist yet, as its consumers do."""

    def __init__(self, kafka: Kafka, topic: str) -> None:
        self._kafka, self._topic = kafka, topic
        self._reader: Reader | None = None
        self.batches: list[PartitionBatch] = []

    def poll(self) -> list[bytes]:
        """All values so far."""
        if self._reader is None:
            with Topics(self._kafka) as topics:
                if self._topic not in topics.names():
                    return []
            self._reader = Reader(self._kafka, self._topic)
        self.batches += self._reader.poll(0.05)
        return [value for batch in self.batches for value in batch.values if value is not None]

    def close(self) -> None:
        """Closes the reader."""
        if self._reader is not None:
            self._reader.close()


@contextmanager
def following(kafka: Kafka, topic: str) -> Iterator[Follower]:
    follower = Follower(kafka, topic)
    try:
        yield follower
    finally:
        follower.close()


def headers_of(kafka: Kafka, topic: str) -> list[dict[str, str]]:
    """The headers of each committed record of partition 0, read with the plain client."""
    consumer = KafkaConsumer(**client_options(kafka), isolation_level="read_committed")
    try:
        partition = TopicPartition(topic, 0)
        consumer.assign([partition])
        consumer.seek_to_beginning()
        end = consumer.end_offsets([partition])[partition]
        found: list[dict[str, str]] = []

        def read() -> bool:
            found.extend(_polled(consumer))
            return bool(consumer.position(partition) >= end)

        until(read, "headers")
        return found
    finally:
        consumer.close(autocommit=False)


def _polled(consumer: KafkaConsumer) -> list[dict[str, str]]:
    records = consumer.poll(timeout_ms=50)
    return [{name: value.decode() for name, value in one.headers} for each in records.values() for one in each]


@contextmanager
def histories_of(settings: Settings) -> Iterator[HistoryStore]:
    """The histories of a stream that has ended, or is not writing."""
    store = HistoryStore(settings.stream_dir / HISTORIES, settings.features.history, 1 << 30)
    try:
        yield store
    finally:
        store.close()


def next_offsets(values: Sequence[bytes]) -> dict[int, int]:
    """The position after the last one covered, by partition."""
    reached: dict[int, int] = {}
    for value in values:
        for part in decode(value).header.ranges:
            reached[part.source.partition] = max(part.next, reached.get(part.source.partition, 0))
    return reached


def deduplicated(values: Sequence[bytes]) -> tuple[list[MicroBatch], dict[Source, int]]:
    """The micro-batches without the rows written twice, and the marks at their end."""
    marks: dict[Source, int] = {}
    kept = []
    for value in values:
        batch = decode(value)
        keep, marks = trim(batch, marks)
        kept.append(batch.take(keep))
    return kept, marks


def rows_by_source(batches: Sequence[MicroBatch]) -> dict[Source, dict[str, bytes]]:
    """The columns of each source's rows, in the order of the log, as bytes."""
    sources = {part.source for batch in batches for part in batch.header.ranges}
    found: dict[Source, dict[str, bytes]] = {}
    for source in sources:
        parts = []
        for batch in batches:
            mine = [index for index, part in enumerate(batch.header.ranges) if part.source == source]
            parts.append(batch.take(np.isin(batch.source, mine)))
        found[source] = {
            name: b"".join(part.columns[name].tobytes() for part in parts) for name in NAMES if name != "source"
        }
    return found
