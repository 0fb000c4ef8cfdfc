"""Clicks of a small shop in a log in memory, and what the local form of the stream makes of them, without Beam."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from state.attributes.values import AttributeStore, AttributeTable, TopicPosition, pack, tables_of
from state.config.sections import Attributes, Events, Features, Kafka, LabelSettings, Paths, Stream
from state.config.settings import Settings
from state.events.identity import Salt, load_salt, public_id, user_id
from state.features.erased import MaskedUsers
from state.features.mask import Mask
from state.history.store import HistoryStore
from state.log import topic_plan
from state.metrics import StreamMetrics
from state.microbatch.batch import trim
from state.microbatch.codec import decode
from state.positions import Source
from state.registry.control import roll_back, start
from state.registry.controls import Controls
from streaming.attributes import Join
from streaming.context import open_job
from streaming.rows import Cut, Encoding, encode_cut
from tests.memory_log import MemoryLog

TOPIC = "ab" * 16
BASE_MS = 1_700_000_000_000
ACTIONS = ("view", "impression", "click")
ATTRIBUTES = Attributes("crm", "goods", ("level",), ("brand",))
MASKED_USER = "user-3"

Place = tuple[str, int, int, int, int]
"""Topic, partition, offset, kind, and the offset of the row's own event."""


class Click(NamedTuple):
    """A record of the topic; `action` is an index of `ACTIONS`, -1 is no JSON, -2 a tombstone; `at_ms` is after `BASE_MS`."""

    user: int
    action: int
    item: int
    at_ms: int

    @property
    def value(self) -> bytes | None:
        if self.action < 0:
            return None if self.action == -2 else b"{no json"
        fields = {
            "user": f"user-{self.user}",
            "item": f"item-{self.item}",
            "category": f"category-{self.item % 3}",
            "action": ACTIONS[self.action],
            "time": BASE_MS + self.at_ms,
        }
        return json.dumps(fields).encode()


clicks = st.lists(
    st.builds(
        Click,
        user=st.integers(0, 11),
        action=st.sampled_from([0, 1, 1, 1, 2, 2, -1, -2]),
        item=st.integers(0, 5),
        at_ms=st.integers(0, 60) | st.integers(0, 600),
    ),
    min_size=20,
    max_size=60,
)
"""Logs of 20 to 60 clicks."""


def settings_of(folder: Path, buckets: int = 1, sources: int = 1, cut_rows: int = 2, masks: bool = False) -> Settings:
    """Settings of a shop whose labels come later and whose users and items have attributes."""
    return Settings(
        paths=Paths(
            state=str(folder), salt_file=str(folder / "salt"), registry=str(folder / "registry") if masks else ""
        ),
        kafka=Kafka(),
        events=Events(actions=ACTIONS, action_weights=(1.0, 0.25, 3.0)),
        labels=LabelSettings(impressions=("impression",), outcomes=("click",), wait_s=0.1, max_waiting=64 * 3),
        attributes=ATTRIBUTES,
        features=Features(windows_s=(60, 600, 7200), half_lives_s=(30, 900), history=16, recent_categories=5),
        stream=Stream(
            cache_users=8,
            buckets=buckets,
            sources=sources,
            cut_ms=2,
            cut_rows=cut_rows,
            metrics_port=0,
        ),
    )


def written(clicks: Sequence[Click], partitions: int, settings: Settings) -> MemoryLog:
    """A log with the clicks; a user's are in one partition, as a topic keyed by user has them."""
    log = MemoryLog(settings.kafka, ids=iter([TOPIC, *(f"{one:032x}" for one in range(1, 9))]).__next__)
    log.topics().ensure(settings.kafka.clicks_topic, partitions)
    log.topics().ensure(*topic_plan.dead_letters(settings))
    log.topics().ensure(*topic_plan.microbatches(settings))
    with log.writer() as writer:
        for one in clicks:
            partition = one.user % partitions
            writer.send(settings.kafka.clicks_topic, partition, None, one.value, (), BASE_MS + one.at_ms)
    return log


def mask_one_user(settings: Settings) -> Mask:
    """Lets control mask `MASKED_USER` and one moment; returns what it asks for."""
    settings.registry_dir.mkdir(parents=True, exist_ok=True)
    controls = Controls(settings.registry_dir)
    first = controls.propose(start(actor="trainer", reason="first start", now_ms=0))
    user = user_id(load_salt(settings.salt_path), MASKED_USER)
    mask = Mask(times=((BASE_MS + 90, BASE_MS + 110),), users=MaskedUsers.of([user]))
    return controls.propose(roll_back(first, 1, mask, actor="ann", reason="poison", now_ms=1)).mask


def known_attributes(path: Path, settings: Settings, salt: Salt) -> Join:
    """Attributes of every second user and of every third item, as a stream has them that has read its topics."""
    tables = tables_of(settings.attributes)
    store = AttributeStore(path, 16 << 20)
    for side, ids in (
        ("user", {number: user_id(salt, f"user-{number}") for number in range(0, 12, 2)}),
        ("item", {number: public_id(f"item-{number}") for number in range(0, 6, 3)}),
    ):
        values = {one: _value(tables[side], f"{side}-{number}") for number, one in ids.items()}
        store.commit(side, values, TopicPosition("of the test", "cd" * 16, {0: 1}))
    return Join(store, [], tables, (), StreamMetrics(CollectorRegistry()))


def _value(table: AttributeTable, text: str) -> bytes:
    return pack(table.ids([text]), [text])


@dataclass
class Outcome:
    """What a stream made of the clicks: by place the bytes of a row, by user the events, and what waits."""

    rows: dict[Place, bytes]
    histories: dict[int, bytes]
    waiting: list[tuple[bytes, bytes]]
    totals: dict[str, int]


def rows_of(values: Sequence[bytes]) -> dict[Place, bytes]:
    """The rows of micro-batches, without those that were written before."""
    marks: dict[Source, int] = {}
    found: dict[Place, bytes] = {}
    for value in values:
        batch = decode(value)
        keep, marks = trim(batch, marks)
        columns = {name: column for name, column in batch.columns.items() if name != "source"}
        for row in np.flatnonzero(keep).tolist():
            source = batch.header.ranges[int(batch.source[row])].source
            opened = int(batch.opened[row])
            place = (source.topic_id, source.partition, int(batch.offset[row]), int(batch.kind[row]), opened)
            assert place not in found, "a row stands at one place once"
            found[place] = b"".join(column[row].tobytes() for column in columns.values())
    return found


def local_form(path: Path, settings: Settings, log: MemoryLog, join: Join, mask: Mask, batch_events: int) -> Outcome:
    """What the local form makes of the clicks, in batches of at most so many."""
    salt = load_salt(settings.salt_path)
    store = HistoryStore(path, settings.features.history, 16 << 20)
    job = replace(open_job(settings, store, salt, TOPIC, mask), join=join)
    encoding, values = Encoding.of(settings.stream, job.spec.digest, salt.fingerprint), list[bytes]()
    with log.reader(settings.kafka.clicks_topic) as reader:
        while batches := reader.poll(0.0, batch_events):
            rows = job.commit(job.make_rows(job.parse(batches), BASE_MS))
            values += encode_cut(Cut((rows,), 0), encoding)
    histories = {user: events for user in users_of(salt) if (events := store.read(user).tobytes())}
    made = Outcome(rows_of(values), histories, list(store.waiting()), store.totals)
    store.close()
    return made


def users_of(salt: Salt) -> Iterator[int]:
    """The pseudonyms of the shop's users."""
    return (user_id(salt, f"user-{number}") for number in range(12))
