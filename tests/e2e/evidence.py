"""What a run left behind, read without TensorFlow, and in what two runs differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from state import probe
from state.attributes.values import AttributeStore, AttributeTable, ids_in
from state.config.sections import Kafka
from state.config.settings import Settings
from state.events.identity import Salt, public_id, user_id
from state.history.store import HistoryStore
from state.history.waiting import WaitingRows
from state.layout import HISTORIES, ROWS
from state.log import Reader, Topics
from state.microbatch.batch import ATTRIBUTES, NAMES, MicroBatch, trained, trim
from state.microbatch.codec import decode
from state.positions import Source
from state.registry.log_line import WHOLE, LogLine, counts
from state.registry.manifest import Manifest
from state.registry.registry import SERVING, TRAINING, Registry
from state.rows.store import RowStore
from state.rows.tables import UNSERVED, tables_in
from tests.e2e.crowd import Knowledge, values_of
from trainer.versions import content

Key = tuple[Source, int, int]


class Joined(NamedTuple):
    """What a row was joined with.

    Attributes:
        kind: Of `Kind`.
        user: Its user's id.
        item: Its item's id.
        attributes: The ids of the attributes of both, by side.
    """

    kind: int
    user: int
    item: int
    attributes: dict[str, tuple[int, ...]]


@dataclass
class LogContent:
    """Everything in a micro-batch log.

    Attributes:
        topic_id: The log's topic.
        rows: (source, offset, how long it waited) -> the bytes of the row without its attributes, each once. Attributes
            follow a topic of their own: a row that is written again may have newer ones.
        joined: The same with attributes.
        learnable: Rows that a trainer learns from.
        records: How many micro-batches there are.
        again: Rows written again after a crash.
        differing: Of them, rows whose bytes are not those of the first time.
        abandoned: Records that an exact rollback left behind; they are in no other figure.
        marks: The next offset of each source.
        gaps: Positions that no micro-batch covers.
        seen: Where in the log a reader has all rows: after the last record with a new one.
    """

    topic_id: str = ""
    rows: dict[Key, bytes] = field(default_factory=dict)
    joined: dict[Key, Joined] = field(default_factory=dict)
    learnable: int = 0
    records: int = 0
    again: int = 0
    differing: int = 0
    abandoned: int = 0
    marks: dict[Source, int] = field(default_factory=dict)
    gaps: int = 0
    seen: int = 0

    def add(self, offset: int, batch: MicroBatch) -> None:
        """Takes the record at `offset`."""
        self.records += 1
        fresh, after = trim(batch, self.marks)
        for part in batch.header.ranges:
            self.gaps += max(0, part.first - self.marks.get(part.source, part.first))
        if fresh.any():
            self.seen = offset + 1
        self.learnable += int((fresh & trained(batch.kind)).sum())
        known = attributes_of(batch)
        for row, (key, value, new) in enumerate(zip(keys(batch), row_bytes(batch), fresh.tolist(), strict=True)):
            if new:
                self.rows[key] = value
                if known:
                    self.joined[key] = known[row]
            else:
                self.again += 1
                self.differing += self.rows.get(key) != value
        self.marks = after


def keys(batch: MicroBatch) -> list[Key]:
    """Where each row came from, and which of the rows there it is."""
    sources = [part.source for part in batch.header.ranges]
    places = zip(batch.source.tolist(), batch.offset.tolist(), batch.waited.tolist(), strict=True)
    return [(sources[source], offset, waited) for source, offset, waited in places]


def attributes_of(batch: MicroBatch) -> list[Joined]:
    """What each row was joined with; empty where nothing is configured."""
    if not any(batch.header.attributes):
        return []
    sides = (batch.user_attributes.tolist(), batch.item_attributes.tolist())
    columns = (batch.kind.tolist(), batch.user.tolist(), batch.item.tolist(), *sides)
    return [
        Joined(kind, user, item, {"user": tuple(of_user), "item": tuple(of_item)})
        for kind, user, item, of_user, of_item in zip(*columns, strict=True)
    ]


def row_bytes(batch: MicroBatch) -> list[bytes]:
    """All that each row says, but for the number of its source, which only this record knows, and its attributes."""
    rows = len(batch)
    if rows == 0:
        return []
    columns = [batch.columns[name] for name in NAMES if name not in ("source", *ATTRIBUTES)]
    flat = [np.ascontiguousarray(column).reshape(rows, -1).view(np.uint8) for column in columns]
    return [row.tobytes() for row in np.concatenate(flat, axis=1)]


def read_log(kafka: Kafka, topic: str, line: LogLine = WHOLE) -> LogContent:
    """Reads a micro-batch log from its beginning to its end, along a line."""
    found = LogContent()
    with Topics(kafka) as topics:
        end = topics.ends(topic)[0][1]
    with Reader(kafka, topic, [0]) as reader:
        found.topic_id = reader.topic_id
        while reader.position(0) < end:
            for batch in reader.poll(0.2):
                for offset, value in zip(batch.offsets.tolist(), batch.values, strict=True):
                    made = decode(value or b"")
                    if counts(line, made.header.log_epoch, offset):
                        found.add(offset, made)
                    else:
                        found.abandoned += 1
    return found


@dataclass(frozen=True)
class LogDifference:
    """In what a log differs from an undisturbed one.

    Attributes:
        lost: Rows that only the undisturbed log has.
        invented: Rows that it does not have.
        changed: Rows with other bytes.
    """

    lost: int
    invented: int
    changed: int


def compare_logs(ours: LogContent, undisturbed: LogContent) -> LogDifference:
    """Compares the sets of (topic id, partition, offset, wait, row bytes)."""
    lost = len(undisturbed.rows.keys() - ours.rows.keys())
    invented = len(ours.rows.keys() - undisturbed.rows.keys())
    both = ours.rows.keys() & undisturbed.rows.keys()
    changed = sum(ours.rows[key] != undisturbed.rows[key] for key in both)
    return LogDifference(lost, invented, changed)


def doubled(trained: int, log: LogContent) -> int:
    """Rows that a trainer learned from twice (negative: never), by its own count and the log's distinct rows."""
    return trained - log.learnable


@dataclass(frozen=True)
class TrainerState:
    """A trainer's state at its newest version.

    Attributes:
        manifest: Of that version.
        tensors: Rows, optimizer rows, dense weights, slots, counters: all that a restart needs, rows ordered by id.
        digest: Over all tensors.
    """

    manifest: Manifest
    tensors: Mapping[str, Any]
    digest: str

    def differs_in(self, other: TrainerState) -> list[str]:
        """The names of the tensors that are not bit-equal."""
        return sorted(
            name
            for name in self.tensors.keys() | other.tensors.keys()
            if name not in self.tensors
            or name not in other.tensors
            or content.digest({name: self.tensors[name]}) != content.digest({name: other.tensors[name]})
        )


def state_at(registry: Registry, version: int) -> TrainerState:
    """The whole state at a version, put together from its base and deltas, every file checked."""
    base, deltas = registry.chain(version)
    parts = (content.decode(registry.read(part, name) for name in (SERVING, TRAINING)) for part in (base, *deltas))
    tensors = probe.without(content.merge(parts))
    return TrainerState((deltas or [base])[-1], tensors, content.digest(tensors))


def newest_state(registry: Registry, epoch: int = 1) -> TrainerState:
    """The whole state at the newest version of an epoch."""
    version = registry.newest(epoch)
    assert version is not None, f"{registry.path} has no version of epoch {epoch}"
    return state_at(registry, version)


@dataclass(frozen=True)
class Histories:
    """What a history store holds.

    Attributes:
        digest: Over the events of all users.
        positions: The next offset of each source.
        totals: Positions by outcome.
        users: How many there are.
        log_next: For a serving host: where it goes on in the micro-batch log; -1 for a stream.
        waiting: The impressions that wait, by key; what they say, but for their attributes.
    """

    digest: str
    positions: dict[Source, int]
    totals: dict[str, int]
    users: int
    log_next: int
    waiting: dict[bytes, bytes]


def stream_histories(settings: Settings) -> Histories:
    """The histories of a stream that has stopped."""
    return _histories(HistoryStore(settings.stream_dir / "histories", settings.features.history, readonly=True))


def serving_histories(settings: Settings) -> Histories:
    """The histories of a serving host."""
    return _histories(HistoryStore(settings.serving_dir / HISTORIES, settings.features.history, readonly=True))


def _histories(store: HistoryStore) -> Histories:
    place = json.loads(store.extra("microbatches") or b"{}")
    found = Histories(
        store.digest(),
        store.positions(),
        store.totals,
        store.users(),
        int(place["next"].get("0", 0)) if place else -1,
        _waiting(store),
    )
    store.close()
    return found


def _waiting(store: HistoryStore) -> dict[bytes, bytes]:
    rows, form = dict(store.waiting()), WaitingRows(store).format
    if not rows:
        return {}
    assert form is not None
    columns = form.unpack(list(rows.values()))
    parts = [columns[name].reshape(len(rows), -1).view(np.uint8) for name in columns if name not in ATTRIBUTES]
    return dict(zip(rows, [row.tobytes() for row in np.concatenate(parts, axis=1)], strict=True))


def attributes_differ(
    log: LogContent, tables: Mapping[str, AttributeTable], knowledge: Knowledge, salt: Salt
) -> list[str]:
    """Where rows have attributes that they cannot have had at their moment.

    1. A row has a change of its own user or item, or nobody's.
    2. In a partition the later of two events never has the older change.
    3. An impression's row does not have an older change than it had when it began to wait.
    """
    owners = {side: _owners(side, knowledge, salt) for side in tables}
    found = []
    for side, table in tables.items():
        numbers = {tuple(table.unknown.tolist()): 0, (0,) * len(table.names): 0}
        for number in range(1, knowledge.changes[side] + 1):
            numbers[tuple(table.ids([str(value) for value in values_of(side, number).values()]))] = number
        newest: dict[tuple[Source, int], int] = {}
        began: dict[tuple[Source, int], int] = {}
        for (source, offset, waited), row in log.joined.items():
            number, own = numbers.get(row.attributes[side], -1), row.user if side == "user" else row.item
            if number < 0 or (number and own not in owners[side]):
                found.append(f"{side} at {source}:{offset}: a stranger's")
            elif waited:
                if number < began.get((source, offset - waited), number):
                    found.append(f"{side} at {source}:{offset}: older than when it began to wait")
            elif number < newest.get((source, own), 0):
                found.append(f"{side} at {source}:{offset}: older than an event before")
            else:
                newest[source, own] = began[source, offset] = number
    return found


def _owners(side: str, knowledge: Knowledge, salt: Salt) -> set[int]:
    ids = [key for one, key in knowledge.newest if one == side]
    return {user_id(salt, one) if side == "user" else public_id(one) for one in ids}


def known_differs(path: Path, tables: Mapping[str, AttributeTable], knowledge: Knowledge, salt: Salt) -> list[str]:
    """The users and items of whom a store of attributes does not have the newest change."""
    store = AttributeStore(path, 1 << 30, readonly=True)
    try:
        found = []
        for (side, key), number in knowledge.newest.items():
            one = user_id(salt, key) if side == "user" else public_id(key)
            (value,) = store.read_many(side, [one])
            wanted = tables[side].ids([str(each) for each in values_of(side, number).values()])
            if value is None or ids_in(value, len(wanted)).tolist() != wanted:
                found.append(f"{side} {key}")
        for side in tables:
            place = store.position(side)
            assert place is not None
            if sum(place.counts.values()) != sum(place.next.values()):
                found.append(f"{side}: {place.counts} do not add up to {place.next}")
        return found
    finally:
        store.close()


def read_up_to(path: Path, ends: Mapping[str, int]) -> bool:
    """Whether a store of attributes was read to `ends`, by side the end of the topic's one partition."""
    store = AttributeStore(path, 1 << 30, readonly=True)
    try:
        places = {side: store.position(side) for side in ends}
        return all(place is not None and place.next.get(0, 0) >= ends[side] for side, place in places.items())
    finally:
        store.close()


def serving_differs(settings: Settings, registry: Registry) -> list[str]:
    """In what serving's rows, dense weights and labels differ from the trainer's at the version that serving names."""
    store = RowStore(settings.serving_dir / ROWS, readonly=True)
    try:
        with store.reader() as reader:
            served = reader.served()
            assert served is not None, "serving has no version"
            tensors = state_at(registry, served.version).tensors
            found = []
            for table in tables_in(tensors):
                if table in UNSERVED:
                    continue
                ids = tensors[f"{table}.ids"].tolist()
                rows, known = reader.get(table, ids, served)
                if not known.all() or rows.tobytes() != tensors[f"{table}.rows"].astype(np.float32).tobytes():
                    found.append(f"{table}.rows")
                # An id that has no row in the trainer has none in serving either.
                strangers = [identity ^ 1 for identity in ids[:1000] if identity ^ 1 not in set(ids)]
                if reader.get(table, strangers, served)[1].any():
                    found.append(f"{table}: rows of strangers")
            dense = reader.dense(served.version)
            for name, tensor in tensors.items():
                if name.startswith("dense."):
                    held = dense.get(name.removeprefix("dense."))
                    if held is None or held.tobytes() != tensor.tobytes():
                        found.append(name)
            if reader.popular(served.version).tobytes() != tensors["popular"].astype(np.uint64).tobytes():
                found.append("popular")
            return found
    finally:
        store.close()


def accounts(made: Manifest) -> dict[str, int]:
    """A version's account of its rows."""
    return {
        name: int(made.metrics[f"account.{name}"]) for name in ("rows", "trained", "skipped", "duplicate", "masked")
    }


def covers(marks: Mapping[Source, int], ends: Mapping[int, int], topic_id: str) -> bool:
    """Whether `marks` reach the end of each partition of the clicks."""
    return all(marks.get(Source(topic_id, partition), 0) >= end for partition, end in ends.items() if end)
