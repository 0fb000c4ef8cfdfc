"""The runs of the golden data: what each is made of, its settings, and its made-up clicks and attributes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploy.kafka.broker import Broker
from deploy.replaying.shoppers import ShopperCrowd
from state.config.loading import load
from state.config.settings import Settings
from state.log import Topics, Writer, partition_of
from tests.streaming.streams import FOREVER

START_MS = 1_700_000_000_000
PARTITIONS = 2
RATE = 0.02  # clicks per second
COMPACT = {"cleanup.policy": "compact", "retention.ms": "-1"}

SMALL = {
    "model.dim": 8, "model.hidden": "16,8", "model.popular": 4, "trainer.capacity": 64, "trainer.device": "cpu",
    "stream.cut_rows": 80, "stream.cut_ms": 1000, "stream.batch_events": 40, "stream.map_gb": 1, "serving.map_gb": 1,
    "stream.metrics_port": 0, "bootstrap.min_rows": 200, "shoppers.users": 60, "shoppers.categories": 16,
    "shoppers.items": 120, "shoppers.drift_s": 20_000, "shoppers.seed": 11,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a run is made of.

    Attributes:
        clicks: How many the shoppers make; some more follow from them.
        learns: Whether there are versions after the first one.
        settings: By name.
    """

    clicks: int
    learns: bool
    settings: Mapping[str, object]

    @property
    def now_ms(self) -> int:
        """The wall clock of the run: a minute after its last click."""
        return START_MS + int(self.clicks / RATE * 1000) + 60_000


RUNS: Mapping[str, Run] = {
    # Clicks alone, with the features of the release. Its first version only: others would be three times as large.
    "clicks": Run(600, False, SMALL),
    # Labels that come later, attributes, context; small features, short histories, rows that are admitted late and expire.
    "joined": Run(800, True, SMALL | {
        "features.windows_s": "86400", "features.half_lives_s": "1800", "features.recent_categories": 6, "features.history": 32,
        "events.context": "device", "trainer.admit_after": 2, "trainer.expire_s": 9000,
        "labels.impressions": "favorite", "labels.outcomes": "cart", "labels.wait_s": 5000,
        "attributes.user_topic": "golden.users", "attributes.user_fields": "age_band,level=memberLevel",
        "attributes.item_topic": "golden.items", "attributes.item_fields": "brand,price:10|50",
        "attributes.slices": "age_band", "attributes.slice_values": 4,
    }),
}  # fmt: skip


def settings_for(run: str, state: Path, broker: Broker) -> Settings:
    """The settings of a run."""
    values = {
        **RUNS[run].settings,
        "paths.state": state,
        "kafka.bootstrap_servers": broker.bootstrap_servers,
        "kafka.clicks_topic": f"golden.{run}.clicks",
        "kafka.microbatches_topic": f"golden.{run}.microbatches",
        "kafka.dead_letters_topic": f"golden.{run}.dlq",
        "kafka.group": f"golden-{run}",
        "kafka.retention_h": 876_000,
    }
    return load([word for name, value in values.items() for word in (f"--{name}", str(value))], {}, "/dev/null")


def clicks_of(settings: Settings, clicks: int) -> list[tuple[str, int, bytes]]:
    """User, time and value of each click; with context each has a device, with labels some favorites are put in a cart."""
    made = ShopperCrowd.from_settings(settings, None, RATE, START_MS).click(clicks)
    chance = np.random.default_rng(17)
    found = []
    for user, item, category, action, at_ms in zip(
        made.users, made.items, made.categories, made.actions, made.at_ms.tolist(), strict=True
    ):
        click: dict[str, object] = {"user": user, "item": item, "category": category, "action": action, "time": at_ms}
        if settings.events.context:
            click["device"] = ("phone", "desktop")[int(chance.random() < 0.3)]
        found.append(click)
        if settings.labels.impressions and action == "favorite" and chance.random() < 0.5:
            found.append(click | {"action": "cart", "time": at_ms + 1 + int(chance.integers(4_000_000))})
    found.sort(key=lambda click: click["time"])  # type: ignore[arg-type, return-value]
    rows = [(str(click["user"]), int(str(click["time"])), json.dumps(click).encode()) for click in found]
    # Records that are no clicks.
    rows.insert(100, ("shopper-1", rows[100][1], b"{not json"))
    rows.insert(400, ("shopper-2", rows[400][1], json.dumps(found[400] | {"action": "stare"}).encode()))
    return rows


def fill(settings: Settings) -> None:
    """Makes the topics and writes attributes and the first half of the clicks."""
    kafka, wanted = settings.kafka, settings.attributes
    with Topics(kafka) as topics, Writer(kafka) as writer:
        topics.ensure(kafka.clicks_topic, PARTITIONS, FOREVER)
        if not wanted.user_topic:
            return
        topics.ensure(wanted.user_topic, 1, COMPACT)
        topics.ensure(wanted.item_topic, 1, COMPACT)
        chance = np.random.default_rng(23)
        for number in range(0, settings.shoppers.users, 2):
            record = {"age_band": ("18-24", "25-34", "65+", None)[number % 4], "memberLevel": int(chance.integers(3))}
            writer.send(wanted.user_topic, 0, f"shopper-{number}".encode(), json.dumps(record).encode(), (), START_MS)
        for category in range(settings.shoppers.categories):
            for rank in range(4):
                record = {"brand": f"brand-{category % 5}", "price": round(float(chance.uniform(1, 90)), 2)}
                key = f"item-{category:02d}-{rank:03d}".encode()
                writer.send(wanted.item_topic, 0, key, json.dumps(record).encode(), (), START_MS)
        # Somebody who changed their mind, and somebody who is forgotten.
        writer.send(wanted.user_topic, 0, b"shopper-2", b'{"age_band":"65+"}', (), START_MS + 1)
        writer.send(wanted.user_topic, 0, b"shopper-4", None, (), START_MS + 1)
        writer.flush()


def send(settings: Settings, rows: Sequence[tuple[str, int, bytes]]) -> None:
    """Writes clicks, acknowledged; Kafka's timestamps are theirs."""
    with Writer(settings.kafka) as writer:
        for user, at_ms, value in rows:
            key = user.encode()
            writer.send(settings.kafka.clicks_topic, partition_of(key, PARTITIONS), key, value, (), at_ms)
        writer.flush()
