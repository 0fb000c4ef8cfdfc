"""What a run left behind, read without TensorFlow, and in what two runs differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deploy.serving.host import HISTORIES, ROWS
from state.config import Settings
from state.history import HistoryStore
from state.log import Reader, Topics
from state.manifest import Manifest
from state.microbatch import NAMES, MicroBatch, decode, trim
from state.positions import Source
from state.registry import SERVING, TRAINING, Registry
from state.rows import TABLES, RowStore
from state.sections import Kafka
from trainer import content

Key = tuple[Source, int]


@dataclass
class LogContent:
    """Everything in a micro-batch log.

    Attributes:
        topic_id: The log's topic.
        rows: (source, offset) -> the bytes of the row, each once.
        records: How many micro-batches there are.
        again: Rows written again after a crash.
        differing: Of them, rows whose bytes are not those of the first time.
        marks: The next offset of each source.
        gaps: Positions that no micro-batch covers.
        seen: Where in the log a reader has all rows: after the last record with a new one.
    """

    topic_id: str = ""
    rows: dict[Key, bytes] = field(default_factory=dict)
    records: int = 0
    again: int = 0
    differing: int = 0
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
        for key, value, new in zip(keys(batch), row_bytes(batch), fresh.tolist(), strict=True):
            if new:
                self.rows[key] = value
            else:
                self.again += 1
                self.differing += self.rows.get(key) != value
        self.marks = after


def keys(batch: MicroBatch) -> list[Key]:
    """Where each row came from."""
    sources = [part.source for part in batch.header.ranges]
    return [
        (sources[source], offset) for source, offset in zip(batch.source.tolist(), batch.offset.tolist(), strict=True)
    ]


def row_bytes(batch: MicroBatch) -> list[bytes]:
    """All that each row says, but for the number of its source, which only this record knows."""
    rows = len(batch)
    if rows == 0:
        return []
    columns = [batch.columns[name] for name in NAMES if name != "source"]
    flat = [np.ascontiguousarray(column).reshape(rows, -1).view(np.uint8) for column in columns]
    return [row.tobytes() for row in np.concatenate(flat, axis=1)]


def read_log(kafka: Kafka, topic: str) -> LogContent:
    """Reads a micro-batch log from its beginning to its end."""
    found = LogContent()
    with Topics(kafka) as topics:
        end = topics.ends(topic)[0][1]
    with Reader(kafka, topic, [0]) as reader:
        found.topic_id = reader.topic_id
        while reader.position(0) < end:
            for batch in reader.poll(0.2):
                for offset, value in zip(batch.offsets.tolist(), batch.values, strict=True):
                    found.add(offset, decode(value or b""))
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
    """Compares the sets of (topic id, partition, offset, row bytes)."""
    lost = len(undisturbed.rows.keys() - ours.rows.keys())
    invented = len(ours.rows.keys() - undisturbed.rows.keys())
    both = ours.rows.keys() & undisturbed.rows.keys()
    changed = sum(ours.rows[key] != undisturbed.rows[key] for key in both)
    return LogDifference(lost, invented, changed)


def doubled(trained: int, log: LogContent) -> int:
    """Rows that a trainer learned from twice (negative: never), by its own count and the log's distinct rows."""
    return trained - len(log.rows)


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
    tensors = content.merge(
        content.decode(registry.read(part, name) for name in (SERVING, TRAINING)) for part in (base, *deltas)
    )
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
    """

    digest: str
    positions: dict[Source, int]
    totals: dict[str, int]
    users: int
    log_next: int


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
    )
    store.close()
    return found


def serving_differs(settings: Settings, registry: Registry) -> list[str]:
    """In what serving's rows, dense weights and labels differ from the trainer's at the version that serving names."""
    store = RowStore(settings.serving_dir / ROWS, settings.serving.map_gb << 30, readonly=True)
    try:
        with store.reader() as reader:
            served = reader.served()
            assert served is not None, "serving has no version"
            tensors = state_at(registry, served.version).tensors
            found = []
            for table in TABLES:
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
