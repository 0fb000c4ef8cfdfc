"""Recorded or synthetic clicks as the records that the stream would write to the training log, without Kafka.

files      -> recorded_batches -> Parser ┐
synthetic  -> encode           -> Parser ┴> events -> windows, labels (the stream's code) -> micro-batches
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from deploy.attributes import AttributeFiles, rows_of_files
from deploy.attributes import encode as encode_attributes
from deploy.replaying.shoppers import Clicks, encode
from state.attributes.follower import packed
from state.attributes.values import AttributeStore, AttributeTable, TopicPosition, tables_of
from state.config.settings import Settings
from state.errors import DecodeError, SettingsError
from state.events.decoding import Decoder, load_decoder
from state.events.identity import Salt, context_id, context_text, pseudonyms, public_id
from state.events.parser import EventBatch, Parser
from state.features.spec import FeatureSpec
from state.history.store import HistoryStore
from state.log import PartitionBatch
from state.metrics import StreamMetrics
from state.microbatch.batch import MicroBatch
from state.microbatch.codec import decode
from state.process.environment import wall_ms
from state.recordings.files import Recording
from state.recordings.rows import NO_TIME, left_out, shown_reasons
from streaming.attributes import Join
from streaming.context import open_job
from streaming.past import recorded_batches, topic_of
from streaming.rows import Cut, Encoding, encode_cut

I64 = NDArray[np.int64]
SALT = Salt(b"springtide evaluate: pseudonyms that are the same in each run")
SYNTHETIC_TOPIC = "5e" * 16


class RecordLimits(NamedTuple):
    """The limits of a training log record: it ends after `rows` clicks or `span_s` of log time, whichever is first."""

    rows: int = 512
    span_s: float = 300.0

    def size(self, at_ms: I64) -> int:
        """The number of clicks of the next record, at least 1.

        `at_ms` is `[n]` int64, the times of the remaining clicks, ascending; NO_TIME for none.

        >>> RecordLimits(3, 1.0).size(np.array([0, 900, 1100])), RecordLimits(1, 1.0).size(np.array([0, 900]))
        (2, 1)
        """
        times = at_ms[: self.rows]
        begin = times[times != NO_TIME][:1]
        late = np.flatnonzero(times > begin[0] + round(self.span_s * 1000)) if begin.size else begin
        return max(1, int(late[0]) if late.size else times.size)


@dataclass
class RecordedEvents:
    """All events of a recording in order of time, one of `batches` for each record of the training log.

    Attributes:
        topic_id: Stands in for the topic's id.
        refused: Records that are not clicks, by reason.
        contexts: By id the name and the text of each value of a context field.
    """

    source: str
    topic_id: str
    limits: RecordLimits
    batches: list[EventBatch] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    contexts: dict[int, tuple[str, str]] = field(default_factory=dict)
    _known: set[tuple[str, str]] = field(default_factory=set)

    def add(self, batch: EventBatch) -> None:
        """Adds the events of a record."""
        self.batches.append(batch)
        self.refused.update(str(letter.reason) for letter in batch.dead)

    def add_contexts(self, settings: Settings, decode: Decoder, values: Sequence[bytes | None]) -> None:
        """Adds the texts of context fields, which requests for recommendations name."""
        for value in values:
            try:
                texts = decode(value or b"").context
            except DecodeError:
                continue
            for name, text in zip(settings.events.context, texts, strict=True):
                if text is not None and (key := (name, context_text(text))) not in self._known:
                    self._known.add(key)
                    self.contexts[context_id(*key)] = key

    def column(self, name: str) -> NDArray[np.generic]:
        """A column of all events."""
        return np.concatenate([getattr(batch, name) for batch in self.batches])

    def __len__(self) -> int:
        return sum(map(len, self.batches))


def read_files(
    settings: Settings, recording: Recording, sort: str, limits: RecordLimits, say: Callable[[str], None]
) -> RecordedEvents:
    """Reads the events of files. `say` receives messages about strange rows.

    `sort` is `memory` (read everything, then order by time) or `assume` (the files are in order).

    Raises:
        SettingsError: The columns do not fit, no row is a click, or the files do not fit in memory.
        SpringtideError: A file is cut or damaged.
    """
    names = ", ".join(str(file.path) for file in recording.files)
    events, parser = RecordedEvents(names, topic_of(recording), limits), Parser(settings.events, SALT)
    decode = load_decoder(settings.events)
    for batches in recorded_batches(settings.events, recording, sort, wall_ms() / 1000, say, limits.size):
        events.add(parser.parse(batches))
        if settings.events.context:
            for batch in batches:
                events.add_contexts(settings, decode, batch.values)
    if not len(events):
        refusals = f": {shown_reasons(events.refused)}" if events.refused else ": the recording is empty"
        do = "correct [events] (fields, actions, time_unit, decoder), --columns or --constant"
        raise SettingsError(f"no row of {names} is a click{refusals}", do if events.refused else "name another file")
    if warning := left_out(events.refused, len(events) + events.refused.total()):
        say(warning)
    return events


def synthetic(
    settings: Settings, name: str, click: Callable[[int], Clicks], clicks: int, limits: RecordLimits
) -> RecordedEvents:
    """Generates the events of synthetic users; `click` returns the next n clicks, and `name` describes them."""
    events, parser = RecordedEvents(name, SYNTHETIC_TOPIC, limits), Parser(settings.events, SALT)
    encoded = encode(click(clicks), settings.events)
    first = 0
    while first < clicks:
        size = limits.size(encoded.kafka_ms[first:])
        part = slice(first, first + size)
        offsets = np.arange(first, first + size, dtype=np.int64)
        batch = PartitionBatch(
            SYNTHETIC_TOPIC,
            0,
            first,
            first + size,
            offsets,
            encoded.kafka_ms[part],
            list(encoded.keys[part]),
            list(encoded.values[part]),
        )
        events.add(parser.parse([batch]))
        first += size
    return events


class KnownFields(NamedTuple):
    """The attributes of users and items, which are constant during the recording; `join` joins them with rows."""

    store: AttributeStore
    tables: Mapping[str, AttributeTable]
    join: Join


@contextmanager
def open_attributes(settings: Settings, files: Sequence[AttributeFiles]) -> Iterator[KnownFields | None]:
    """Yields the attributes in files; None if `[attributes]` names no topic.

    Attributes of users and items that are not in the files are unknown.

    Raises:
        SettingsError: The columns do not fit.
        SpringtideError: A file is cut or damaged.
    """
    tables = tables_of(settings.attributes)
    if not tables:
        yield None
        return
    ids = {"user": pseudonyms(SALT), "item": public_id}
    with tempfile.TemporaryDirectory(prefix="springtide-evaluate-") as folder:
        store = AttributeStore(Path(folder))
        for side in files:
            for _, rows in rows_of_files(side):
                records = encode_attributes(rows, side).records
                values = {ids[side.side](key.decode()): packed(side.table, value) for key, value in records}
                store.commit(side.side, values, TopicPosition("", "", {}))
        join = Join(store, (), tables, settings.attributes.slices, StreamMetrics(CollectorRegistry()))
        try:
            yield KnownFields(store, tables, join)
        finally:
            join.close()


@contextmanager
def micro_batches(
    settings: Settings,
    spec: FeatureSpec,
    events: RecordedEvents,
    attributes: KnownFields | None = None,
    batches: Sequence[EventBatch] | None = None,
) -> Iterator[Iterator[MicroBatch]]:
    """Yields an iterator over the records of the training log, computed by the stream's code from empty histories.

    `batches` limits it to the first batches of the recording; by default it uses all.
    """
    with tempfile.TemporaryDirectory(prefix="springtide-evaluate-") as folder:
        store = HistoryStore(Path(folder), spec.history)
        join = None if attributes is None else attributes.join
        job = replace(open_job(settings, store, SALT, events.topic_id), join=join)
        encoding = Encoding(spec.digest, SALT.fingerprint, 1 << 16)

        def converted() -> Iterator[MicroBatch]:
            now_ms = wall_ms()
            for batch in events.batches if batches is None else batches:
                rows = job.commit(job.make_rows(batch, now_ms))
                if len(rows):
                    for record in encode_cut(Cut((rows,), now_ms), encoding):
                        yield decode(record)

        try:
            yield converted()
        finally:
            store.close()
