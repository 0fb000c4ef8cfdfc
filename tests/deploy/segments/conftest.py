"""A serving host whose histories follow a training log in Kafka, and the keeper of its segments."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from deploy.segments.judging import pseudonym
from deploy.segments.process import SegmentKeeper
from deploy.serving.answers.predictor import Predictor
from deploy.serving.answers.predictor import Stores as HostStores
from deploy.serving.following.clicks import HistoryFollower
from deploy.serving.host_files import CONTROL_NOTE, MASK_NOTE
from state.config.sections import SegmentSettings
from state.config.settings import Settings
from state.events.identity import Salt, public_id, user_id
from state.features.mask import Mask
from state.log import Log, Topics, Writer, topic_plan
from state.metrics import ApplierMetrics, SegmentMetrics
from state.microbatch.batch import Header
from state.microbatch.codec import encode
from state.positions import Range, Source
from state.segments import Membership, key_of
from tests.conftest import KafkaFactory
from tests.deploy.serving.conftest import lowered as lowered
from tests.deploy.serving.conftest import stores as stores
from tests.deploy.serving.stocked import NOW_MS, SALT_KEY, Stores
from tests.microbatches import columns

SALT = Salt(SALT_KEY)
CLICKS = Source("ee" * 16, 0)
DEADLINE_S = 120.0
_numbers = itertools.count(1)


def of(name: str) -> int:
    """A user's pseudonym."""
    return user_id(SALT, name)


@dataclass
class KeptHost:
    """The host; its clocks stand still until a test moves them.

    Attributes:
        stores: What the applier writes.
        settings: With segments and a Kafka.
        now_ms: The wall clock.
    """

    stores: Stores
    settings: Settings
    now_ms: int = NOW_MS
    metrics: SegmentMetrics = field(default_factory=lambda: SegmentMetrics(CollectorRegistry()))
    _clicked: int = 0

    def __post_init__(self) -> None:
        kafka = self.settings.kafka
        self.log = Log(kafka)
        with Topics(kafka) as topics:
            topics.ensure(*topic_plan.microbatches(self.settings))
        metrics = ApplierMetrics(CollectorRegistry())
        self._follower = HistoryFollower(self.stores.histories, self.settings, metrics, lambda: self.now_ms)
        self._follower.connect(self.log, kafka.microbatches_topic)
        serving = replace(self.settings.serving, clock="wall")
        self.predictor = Predictor(
            HostStores(self.stores.rows, self.stores.histories),
            replace(self.settings, serving=serving),
            SALT,
            lambda: self.now_ms,
            pseudonym,
        )
        self.keeper = self.start()

    def start(self) -> SegmentKeeper:
        """The keeper, as after a start of its process."""
        self.keeper = SegmentKeeper(
            self.settings,
            lambda: self.predictor,
            self.log,
            self.metrics,
            lambda: self.now_ms,
            lambda: self.now_ms / 1000,
        )
        return self.keeper

    def click(self, *clicks: tuple[str, str]) -> None:
        """Writes clicks (user, category) of now to the training log, and lets the histories follow."""
        first, rows = self._clicked, len(clicks)
        self._clicked += rows
        made = columns(
            rows,
            user=[of(user) for user, _ in clicks],
            item=np.full(rows, public_id("i1"), np.uint64),
            category=np.array([public_id(category) for _, category in clicks], np.uint64),
            at_ms=np.full(rows, self.now_ms),
            offset=np.arange(first, first + rows),
        )
        header = Header("spec", SALT.fingerprint, (Range(CLICKS, first, first + rows, rows=rows),), self.now_ms)
        with Writer(self.settings.kafka) as writer:
            writer.send(self.settings.kafka.microbatches_topic, 0, None, encode(header, made))
            writer.flush()
        taken = 0
        while not taken:
            taken = self._follower.step(0.1)

    def control(self, generation: int, mask: Mask = Mask.NONE, version: int | None = None) -> None:
        """What the applier notes of a new generation of control, and the version that it lets answer."""
        note = json.dumps({"generation": generation}).encode()
        self.stores.rows.steer({CONTROL_NOTE: note, MASK_NOTE: mask.to_bytes()}, version)

    def until(self, look: Callable[[], Any], most: int | None = None) -> None:
        """Lets the keeper do rounds until `look` is true: so many at most, else for two minutes."""
        done, end_s = 0, time.monotonic() + DEADLINE_S
        while not look():
            in_time = done < most if most else time.monotonic() < end_s
            assert in_time, f"not after {done} rounds: {self.members()}"
            self.keeper.step()
            done += 1

    def members(self) -> dict[str, set[str]]:
        """Who of `ann`, `bob` and `cem` is in each segment, as readers of the store see it."""
        users = {of(name): name for name in ("ann", "bob", "cem")}
        store, names = self.keeper._store, [*self.keeper._members._names]
        return {name: {users[user] for user, _ in store.page(name, 0, 100)} for name in names}

    def membership(self, segment: str, user: str) -> Membership | None:
        """Since when a user is in a segment."""
        return self.keeper._store.memberships([(segment, of(user))])[0]

    def topic(self) -> dict[bytes, list[bytes | None]]:
        """All records of the topic by key, in order."""
        found: dict[bytes, list[bytes | None]] = {}
        topic = self.settings.segments.topic
        with Topics(self.settings.kafka) as topics:
            (_, end) = topics.ends(topic)[0]
        with self.log.reader(topic, [0]) as reader:
            while reader.position(0) < end:
                for batch in reader.poll(0.1):
                    for key, value in zip(batch.keys, batch.values, strict=True):
                        found.setdefault(bytes(key or b""), []).append(value)
        return found

    def last(self, segment: str, user: str) -> bytes | None:
        """The newest record of a member; a tombstone, or none at all, is None."""
        return self.topic().get(key_of((segment, of(user))), [None])[-1]

    def close(self) -> None:
        """Ends all that reads and writes."""
        self.keeper.close()
        self._follower.disconnect()


@pytest.fixture
def keeping(stores: Stores, kafka_settings: KafkaFactory) -> Iterator[Callable[..., KeptHost]]:
    """Makes the host with segments of these expressions."""
    made: list[KeptHost] = []

    def make(expressions: Sequence[str], lookalikes: int = 0) -> KeptHost:
        kafka = kafka_settings()
        segments = SegmentSettings(tuple(expressions), f"segments-of-{kafka.group}", lookalikes)
        made.append(KeptHost(stores, replace(stores.settings, kafka=kafka, segments=segments)))
        return made[-1]

    yield make
    for one in made:
        one.close()
