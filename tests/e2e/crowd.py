"""A finite stream of clicks that follows from a seed, some of them broken, written into the clicks topic bit by bit.

Where labels arrive later, outcomes follow their impressions, some of them too
late; where there are attributes, they change all the time. Each change of one
side has a number, so that what a click was joined with tells how new it was.
"""

from __future__ import annotations

import heapq
import json
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from deploy.replaying.shoppers import Clicks, ShopperCrowd, encode
from state.attributes.values import SIDES
from state.config.settings import Settings
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


OUTCOME_SHARE = 0.5
LATEST = 1.4  # of the wait: some outcomes come when it is over
KNOWN = 40  # users, and items, whose attributes change
CHANGES = 3  # a chunk
TIERS = 5
BROKEN_RECORD = b"no record"


@dataclass(frozen=True)
class Record:
    topic: str
    partition: int
    key: bytes
    value: bytes
    at_ms: int


def records(settings: Settings, seed: int, start_ms: int) -> Iterator[list[Record]]:
    """Chunks of the clicks of `CHUNK_S` each, for ever; the same for the same arguments."""
    rate = settings.shoppers.rate
    shoppers = ShopperCrowd.from_settings(settings, seed, rate, start_ms)
    chance = random.Random(seed)
    outcomes = Outcomes(settings, chance)
    while True:
        clicks = outcomes.after(shoppers.click(max(1, round(rate * CHUNK_S))))
        piece = encode(clicks, settings.events)
        values = [chance.choice(BROKEN) if chance.random() < BROKEN_SHARE else value for value in piece.values]
        yield as_records(settings, piece.keys, values, clicks.at_ms.tolist())


def as_records(settings: Settings, keys: Sequence[bytes], values: Sequence[bytes], times_ms: list[int]) -> list[Record]:
    """Records of the clicks topic, divided by the user, so that a user's clicks keep their order."""
    topic, partitions = settings.kafka.clicks_topic, settings.kafka.clicks_partitions
    return [
        Record(topic, sum(key) % partitions, key, value, at_ms)
        for key, value, at_ms in zip(keys, values, times_ms, strict=True)
    ]


class Outcomes:
    """Earlier impressions get their outcomes; nothing happens where no label comes later."""

    def __init__(self, settings: Settings, chance: random.Random) -> None:
        self._labels, self._chance = settings.labels, chance
        self._due: list[tuple[int, int, str, str, str]] = []
        self._number = 0

    def after(self, clicks: Clicks) -> Clicks:
        """The clicks, and the outcomes that are due by their end."""
        labels = self._labels
        if not labels.impressions:
            return clicks
        rows = list(
            zip(clicks.users, clicks.items, clicks.categories, clicks.actions, clicks.at_ms.tolist(), strict=True)
        )
        for user, item, category, action, at_ms in rows:
            if action in labels.impressions and self._chance.random() < OUTCOME_SHARE:
                due_ms = at_ms + round(self._chance.uniform(0.0, LATEST) * labels.wait_s * 1000)
                self._number += 1
                heapq.heappush(self._due, (due_ms, self._number, user, item, category))
        now_ms = rows[-1][-1]
        while self._due and self._due[0][0] <= now_ms:
            due_ms, _, user, item, category = heapq.heappop(self._due)
            rows.append((user, item, category, labels.outcomes[0], due_ms))
        users, items, categories, actions, times = zip(*rows, strict=True)
        return Clicks(users, items, categories, actions, np.array(times, np.int64))


class Knowledge:
    """Changing attributes of some users and items.

    Attributes:
        newest: (side, plain id) -> the number of its newest change.
        changes: By side how many changes there were; they count from 1.
    """

    def __init__(self, settings: Settings, seed: int) -> None:
        own = settings.attributes
        self._topics = {side: topic for side in SIDES if (topic := getattr(own, f"{side}_topic"))}
        self._chance = random.Random(seed + 1)
        self._ids = {
            "user": [f"shopper-{number}" for number in range(KNOWN)],
            "item": [f"item-{category:02d}-000" for category in range(KNOWN)],
        }
        self.newest: dict[tuple[str, str], int] = {}
        self.changes = dict.fromkeys(self._topics, 0)

    def change(self, at_ms: int) -> list[Record]:
        """Some changes, each of another id: a chunk may be sent twice, and no id may seem to go back by that."""
        made = []
        for side, topic in self._topics.items():
            for key in self._chance.sample(self._ids[side], CHANGES):
                self.changes[side] += 1
                number = self.newest[side, key] = self.changes[side]
                made.append(Record(topic, 0, key.encode(), json.dumps(values_of(side, number)).encode(), at_ms))
            if self._chance.random() < BROKEN_SHARE:
                made.append(Record(topic, 0, self._ids[side][0].encode(), BROKEN_RECORD, at_ms))
        return made


def values_of(side: str, number: int) -> dict[str, int]:
    """What a change says: its number, and a value that few numbers share.

    >>> values_of("user", 7)
    {'user_change': 7, 'user_tier': 2}
    """
    return {f"{side}_change": number, f"{side}_tier": number % TIERS}


class Crowd:
    """Writes the records at their pace from a thread of its own until `finish`.

    A broker that is away costs time only: a chunk that was not acknowledged is
    sent again, so that a click may be in the topic twice, as with any producer.
    """

    def __init__(self, settings: Settings, seed: int, start_ms: int) -> None:
        self._settings = settings
        self._chunks = records(settings, seed, start_ms)
        self.knowledge = Knowledge(settings, seed)
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
        # Not begun where the loop did not come up.
        if self._thread.is_alive():
            self._thread.join()
        return self.written

    def _run(self) -> None:
        writer: Writer | None = None
        due_s = time.monotonic()
        while not self._finished.is_set():
            chunk = next(self._chunks)
            clicks = len(chunk)
            chunk = [*chunk, *self.knowledge.change(chunk[-1].at_ms)]
            while True:
                try:
                    writer = writer or Writer(self._settings.kafka)
                    for one in chunk:
                        writer.send(one.topic, one.partition, one.key, one.value, (), one.at_ms)
                    writer.flush()
                    break
                except LogError:
                    self.repeated_chunks += 1
                    if writer is not None:
                        writer.close(0.0)
                    writer = None
            self.written += clicks
            due_s = max(due_s + CHUNK_S, time.monotonic() - 1.0)
            self._finished.wait(max(0.0, due_s - time.monotonic()))
        if writer is not None:
            writer.close()
