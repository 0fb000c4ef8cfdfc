"""A finite stream of clicks that follows from a seed, some of them broken, written into the clicks topic bit by bit."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deploy.shoppers import Shoppers, encode
from state.config import Settings
from state.errors import LogError
from state.log import Writer

CHUNK_S = 0.1
BROKEN_SHARE = 0.02
BROKEN: Sequence[bytes] = (
    b"",
    b"no json",
    b'{"user":"shopper-1","item":"i","category":"c","action":"view"}',
    b'{"user":"","item":"i","category":"c","action":"view","time":1}',
    b'{"user":"shopper-2","item":"i","category":"c","action":"stares","time":1}',
    b'{"user":"shopper-3","item":"i","category":"c","action":"view","time":"soon"}',
    b'{"user":"shopper-4","item":7.5,"category":[],"action":"view","time":1}',
)


@dataclass(frozen=True)
class Record:
    """One record of the clicks topic."""

    partition: int
    key: bytes
    value: bytes
    at_ms: int


def records(settings: Settings, seed: int, start_ms: int) -> Iterator[list[Record]]:
    """Chunks of the clicks of `CHUNK_S` each, for ever; the same for the same arguments."""
    rate = settings.shoppers.rate
    shoppers = Shoppers.from_settings(settings, seed, rate, start_ms)
    chance = random.Random(seed)
    partitions = settings.kafka.clicks_partitions
    while True:
        clicks = shoppers.click(max(1, round(rate * CHUNK_S)))
        keys, values = encode(clicks, settings.events)
        chunk = []
        for key, value, at_ms in zip(keys, values, clicks.at_ms.tolist(), strict=True):
            if chance.random() < BROKEN_SHARE:
                value = chance.choice(BROKEN)
            # By the user, so that a user's clicks keep their order.
            chunk.append(Record(sum(key) % partitions, key, value, at_ms))
        yield chunk


class Crowd:
    """Writes the records at their pace from a thread of its own until `finish`.

    A broker that is away costs time only: a chunk that was not acknowledged is
    sent again, so that a click may be in the topic twice, as with any producer.
    """

    def __init__(self, settings: Settings, seed: int, start_ms: int) -> None:
        self._settings = settings
        self._chunks = records(settings, seed, start_ms)
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._run, name="crowd", daemon=True)
        self.written = 0
        self.repeated_chunks = 0

    def start(self) -> None:
        """Begins to click."""
        self._thread.start()

    def finish(self) -> int:
        """Ends the stream after the chunk at hand; returns how many records were acknowledged."""
        self._finished.set()
        self._thread.join()
        return self.written

    def _run(self) -> None:
        writer: Writer | None = None
        due_s = time.monotonic()
        while not self._finished.is_set():
            chunk = next(self._chunks)
            while True:
                try:
                    writer = writer or Writer(self._settings.kafka)
                    for one in chunk:
                        writer.send(self._settings.kafka.clicks_topic, one.partition, one.key, one.value, (), one.at_ms)
                    writer.flush()
                    break
                except LogError:
                    self.repeated_chunks += 1
                    if writer is not None:
                        writer.close(0.0)
                    writer = None
            self.written += len(chunk)
            due_s = max(due_s + CHUNK_S, time.monotonic() - 1.0)
            self._finished.wait(max(0.0, due_s - time.monotonic()))
        if writer is not None:
            writer.close()
