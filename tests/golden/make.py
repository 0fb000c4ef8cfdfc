"""Makes golden data of this release: real runs over synthetic shoppers, whose state later releases must still read.

    python -m tests.golden.make OUTPUT [--only clicks|joined]

Needs nothing of the machine: it starts a Kafka of its own. Each run:

 1. Topics with the clicks of made-up shoppers (fixed seed, fixed times), two of them no clicks.
 2. The bootstrap, and the stream as a process, stopped and started again half way.
 3. The trainer from nothing: version 1. The run `joined` goes on: version 2, the compactor's base of it, version 3.
 4. The applier; answers are pinned to 2 and follow again; rolled back to 2 with a mask, so that 3 is abandoned.
 5. The trainer again: version 4, of epoch 2. The applier again. What is left of the log nobody has learned yet.
 6. The stores compacted, the topics' records copied, all packed as `<run>-<release>.tar.xz`.
 7. `measures.measure` and `learning.learn_on` over what was unpacked from there: `expected.json`.

Runs differ in topic ids and in how clicks came to lie in micro-batches, which Kafka and the clock decide, and so in
every digest: this is made once for a release, and kept."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from kafka import KafkaConsumer, TopicPartition
from prometheus_client import CollectorRegistry

from deploy.local_kafka import Broker
from deploy.replaying.shoppers import Population, ShopperCrowd
from deploy.serving.applier import FETCH_S, Applier
from deploy.serving.host_files import CAUGHT_UP_EXTRA
from springtide_client import __version__ as RELEASE
from state.config.loading import load
from state.config.sections import Kafka
from state.config.settings import Settings
from state.features.mask import Mask
from state.features.spec import FeatureSpec
from state.history.store import HistoryStore
from state.layout import HISTORIES, MARK
from state.log import Log, Topics, Writer, client_options, partition_of
from state.metrics import TrainerMetrics
from state.microbatch.codec import decode
from state.process.environment import Clocks
from state.process.network import free_port
from state.registry.control import follow, pin, roll_back, start
from state.registry.registry import Registry
from streaming import bootstrap
from tests.golden.archive import (
    EXPECTED,
    Document,
    Topic,
    described,
    read_topic,
    settings_of,
    unpack,
    write_topic,
)
from tests.golden.learning import STEPS_FROM_NOTHING, STEPS_ON, learn_on, new_trainer
from tests.golden.measures import measure
from tests.streaming.streams import FOREVER, following, next_offsets, running, until
from trainer import compactor, device
from trainer.learner import Learner, Surroundings
from trainer.publications import ServedModel
from trainer.versions import checkpoint
from trainer.versions.lowering import build

EVERY = 3  # records of a version
SALT = "golden salt of made-up shoppers"
ANSWERED = (*(f"shopper-{number}" for number in (0, 1, 2, 3, 5, 8, 13, 21, 34)), "nobody")
ITEM = "item-03-000"


def poison(registry: Registry, version: int) -> Mask:
    """Some clicks that were trained after `version`, of the partition that it has read furthest."""
    source, after = max(registry.manifest(version).marks.items(), key=lambda mark: mark[1])
    return Mask(offsets=((source.topic, source.partition, after + 5, after + 25),))


def make(run: str, broker: Broker, work: Path, output: Path) -> Document:
    """Makes one run; returns what is expected of it."""
    settings, now_ms = settings_for(run, work / "state", broker), RUNS[run].now_ms
    settings.state_dir.mkdir(parents=True)
    settings.salt_path.write_text(SALT)
    settings.salt_path.chmod(0o600)
    # 1. and 2.
    fill(settings)
    rows = clicks_of(settings, RUNS[run].clicks)
    half = len(rows) // 2
    send(settings, rows[:half])
    bootstrap.run(settings, print, clock=lambda: now_ms / 1000)
    stream(settings, work / "stream.log")
    send(settings, rows[half:])
    stream(settings, work / "stream.log")
    names = {"clicks": settings.kafka.clicks_topic, "microbatches": settings.kafka.microbatches_topic}
    if settings.attributes.user_topic:
        names |= {"users": settings.attributes.user_topic, "items": settings.attributes.item_topic}
    topics = {short: records_of(settings.kafka, name) for short, name in names.items()}
    log = topics["microbatches"]
    print(f"{run}: {len(rows)} records of clicks, {len(log.records)} of the log")
    # 3.
    registry = Registry(settings.registry_dir)
    training = Training(settings, registry, now_ms)
    newest = training.version(0)
    if RUNS[run].learns:
        assert training.version(EVERY) == 2
        compactor.run(settings, clock=lambda: now_ms / 1000)
        assert training.version(EVERY - 1) == 3
        # 4.
        serve(settings, 3, topics, now_ms)
        mask = poison(registry, 2)
        registry.change(partial(pin, version=2, actor="golden", reason="odd answers", now_ms=now_ms))
        registry.change(partial(follow, actor="golden", reason="they were fine", now_ms=now_ms))
        registry.change(partial(roll_back, to=2, mask=mask, actor="golden", reason="poison", now_ms=now_ms))
        registry.change(partial(follow, actor="golden", reason="without it", now_ms=now_ms))
        # 5.
        newest = training.version(EVERY)
        assert newest == 4
    serve(settings, newest, topics, now_ms)
    # 6.
    gather(settings, topics, work / "stage")
    archive = output / f"{run}-{RELEASE}.tar.xz"
    pack(work / "stage", archive)
    # 7.
    state = unpack(archive, work / "unpacked")
    read = settings_of({"settings": described(settings)}, state)
    found = {
        "archive": archive.name,
        "bytes": archive.stat().st_size,
        "settings": described(settings),
        "answers_at_ms": now_ms,
        "item": ITEM,
        **measure(state, read, now_ms, ANSWERED, ITEM),
    }
    registry, log = Registry(state / "registry"), read_topic(state / "topics", "microbatches")
    control = registry.control()
    assert control is not None
    if RUNS[run].learns:
        found["learned on"] = learn_on(training.trainer, registry, log, newest, STEPS_ON, control.mask)
    found["learned from nothing"] = learn_on(training.trainer, registry, log, None, STEPS_FROM_NOTHING, Mask.NONE)
    return found


def main() -> None:
    """Makes the runs and `expected.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", choices=tuple(RUNS))
    asked = parser.parse_args()
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    asked.output.mkdir(parents=True, exist_ok=True)
    place = asked.output / EXPECTED
    # Threads are fixed before the first operation, which the bootstrap's analysis has.
    device.prepare("cpu", threads=1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    document: Document = json.loads(place.read_text()) if place.exists() else {}
    document |= {"release": RELEASE, "commit": commit}
    for run in RUNS if asked.only is None else [asked.only]:
        with tempfile.TemporaryDirectory(prefix="springtide-golden-") as folder:
            work = Path(folder)
            with Broker(work / "kafka", free_port(), heap_mb=320, retention_h=876_000) as broker:
                document.setdefault("runs", {})[run] = make(run, broker, work, asked.output)
    place.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def compacted(source: Path, target: Path) -> None:
    """A compact copy of an LMDB store that is closed, with its mark."""
    target.mkdir(parents=True)
    with lmdb.open(str(source), readonly=True, max_dbs=8) as env:
        env.copy(str(target), compact=True)
    if (source / MARK).exists():
        shutil.copy(source / MARK, target)


def gather(settings: Settings, topics: Mapping[str, Topic], stage: Path) -> None:
    """What is kept of a state directory."""
    state = settings.state_dir
    shutil.copytree(settings.registry_dir, stage / "registry", ignore=shutil.ignore_patterns("*.lock", "tmp", "lock"))
    shutil.copy(settings.salt_path, stage / "salt")
    for owner in (settings.stream_dir, settings.serving_dir):
        there = stage / owner.relative_to(state)
        HistoryStore.copied(owner / "histories", there / "histories", settings.features.history)
        for name in ("rows", "attributes"):
            if (owner / name).exists():
                compacted(owner / name, there / name)
    shutil.copytree(settings.serving_dir / "programs", stage / "serving" / "programs")
    for name, topic in topics.items():
        write_topic(stage / "topics", name, topic)
    for lock in stage.rglob("lock.mdb"):
        lock.unlink()


def pack(stage: Path, archive: Path) -> None:
    """Packs `stage`; LZMA finds again what a base and its deltas have in common."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        return member

    with tarfile.open(archive, "w:xz", preset=9) as packed:
        for path in sorted(stage.iterdir()):
            packed.add(path, path.name, filter=plain)


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
        self._program = registry.specs.add_program(build(self.trainer.ranker()))
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
            ServedModel(
                self._program,
                self._spec,
                self.registry.specs.spec(self._spec),
                checkpoint.environment(self._settings, self.trainer.device, self.trainer.engine.name),
            ),
            TrainerMetrics(CollectorRegistry()),
            Surroundings(clocks=Clocks(lambda: self._now_ms / 1000, lambda: 0.0)),
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


START_MS = 1_700_000_000_000
PARTITIONS = 2
RATE = 0.02  # clicks per second
CATEGORIES = 16
COMPACT = {"cleanup.policy": "compact", "retention.ms": "-1"}

SMALL = {
    "model.dim": 8, "model.hidden": "16,8", "model.popular": 4, "trainer.device": "cpu",
    "stream.cut_rows": 80, "stream.cut_ms": 1000,
    "stream.metrics_port": 0, "bootstrap.min_rows": 200, "shoppers.users": 60,
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
    made = ShopperCrowd(
        Population(settings.shoppers.users, CATEGORIES, 120, 20_000.0), RATE, 11, START_MS, settings.events.actions
    ).click(clicks)
    chance = np.random.default_rng(17)
    found = []
    for user, item, category, action, at_ms in zip(
        made.users, made.items, made.categories, made.actions, made.at_ms.tolist(), strict=True
    ):
        click: dict[str, Any] = {"user": user, "item": item, "category": category, "action": action, "time": at_ms}
        if settings.events.context:
            click["device"] = ("phone", "desktop")[int(chance.random() < 0.3)]
        found.append(click)
        if settings.labels.impressions and action == "favorite" and chance.random() < 0.5:
            found.append(click | {"action": "cart", "time": at_ms + 1 + int(chance.integers(4_000_000))})
    found.sort(key=lambda click: click["time"])
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
        for category in range(CATEGORIES):
            for rank in range(4):
                of_item = {"brand": f"brand-{category % 5}", "price": round(float(chance.uniform(1, 90)), 2)}
                key = f"item-{category:02d}-{rank:03d}".encode()
                writer.send(wanted.item_topic, 0, key, json.dumps(of_item).encode(), (), START_MS)
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


if __name__ == "__main__":
    main()
