"""What one stream process owns: its directory, store, place in the log, writer and metrics.

The pipeline is one fused stage in one process, and Beam builds the steps'
objects from pickles; so the steps ask `current` for the one shard that main
has opened, instead of carrying it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from prometheus_client import CollectorRegistry

from state import metrics
from state.attributes.follower import AttributeFollower
from state.attributes.store import open_anew
from state.attributes.values import tables_of
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import SaltMismatch, SpecMismatch
from state.events.identity import Salt, load_salt
from state.events.parser import Parser
from state.features.spec import FeatureSpec
from state.history.store import Appends, HistoryStore
from state.log import Reader, Topics, Writer, plan
from state.log.gaps import Consent
from state.metrics import StreamMetrics
from state.positions import Source
from streaming import accounts, takeover
from streaming.attributes import Join, letters
from streaming.cut import Cut, encode_cut
from streaming.labels import Labels, open_labels
from streaming.profile import Profiler
from streaming.rows import Rows

logger = logging.getLogger(__name__)

SPEC, SALT = "spec", "salt"  # names of the store's extras
ATTRIBUTES = "attributes"
NO_CONSENT = Consent()


@dataclass
class Shard:
    """Everything the steps share; made by `open_shard`, used by the steps through `current`.

    Attributes:
        settings: The effective settings.
        spec: The feature spec.
        salt: Fingerprint of the salt.
        topic_id: The id of the topic of clicks.
        store: Histories and positions.
        reader: The clicks; used by the Beam thread only.
        writer: Micro-batches and dead letters; used by the commit thread only, which replaces it after an outage.
        parser: Records to events; used by the Beam thread only.
        profiler: Histories in memory; used by the Beam thread, told of commits by the commit thread.
        metrics: What the process counts.
        committed: Next offsets as committed; replaced as a whole by the commit thread.
        labels: Impressions that wait; None where none can. The Beam thread attributes, the commit thread looks up.
        closing: What runs, last in first out, before the above is closed.
        join: Attributes of users and items; None where none are configured.
        stopping: Set by a signal: no further poll begins.
        failure: The first exception of a step; Beam passes on only its text.
    """

    settings: Settings
    spec: FeatureSpec
    salt: str
    topic_id: str
    store: HistoryStore
    reader: Reader
    writer: Writer
    parser: Parser
    profiler: Profiler
    metrics: StreamMetrics
    committed: dict[Source, int]
    labels: Labels | None
    closing: ExitStack
    join: Join | None = None
    stopping: threading.Event = field(default_factory=threading.Event)
    failure: BaseException | None = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Remembers the first exception that leaves the block."""
        try:
            yield
        except Exception as error:
            self.failure = self.failure or error
            raise


_shards: list[Shard] = []


def current() -> Shard:
    """The shard that this process has open."""
    return _shards[-1]


@contextmanager
def installed(shard: Shard) -> Iterator[Shard]:
    """Makes `shard` the current one in the block."""
    _shards.append(shard)
    try:
        yield shard
    finally:
        _shards.remove(shard)


@contextmanager
def open_shard(settings: Settings, consent: Consent = NO_CONSENT) -> Iterator[Shard]:
    """Opens what a stream process owns, in the order in which a mistake does the least harm.

    1. The directory's lock, so that nobody else has the store.
    2. The store, which must be of this salt and this feature spec.
    3. The metrics' port.
    4. The topics; a missing topic of clicks is an error, the two others are created.
    5. The writer, which fences one with the same transactional id; attributes, read to the ends of their topics.
    6. The gaps that `consent` covers are passed, with a record of it; any other one ends the process.
    7. The reader, at the store's positions.

    Args:
        settings: The effective settings.
        consent: The losses that the operator accepts.

    Raises:
        LockHeld: Another process has the directory.
        SaltMismatch: The store's pseudonyms were made with another salt.
        SpecMismatch: The store belongs to other feature settings.
        PortTaken: The metrics' port is in use.
        GapError: Positions are gone, and nobody accepted it.
        LogError: Kafka is not reachable, or a topic is missing.
        StoreError: The store cannot be opened.
    """
    stream, kafka = settings.stream, settings.kafka
    spec = FeatureSpec.from_settings(settings)
    with ExitStack() as stack:
        # 1.
        settings.stream_dir.mkdir(parents=True, exist_ok=True)
        stack.enter_context(DirectoryLock(settings.stream_dir))
        salt = load_salt(settings.salt_path)
        # 2.
        if (aside := takeover.finish(settings.stream_dir)) is not None:
            logger.info("using the histories of a rebuild that was cut short; the store before them is %s", aside)
        store = HistoryStore(
            settings.stream_dir / takeover.HISTORIES, history=spec.history, map_bytes=stream.map_gb << 30
        )
        stack.callback(store.close)
        check_identity(store, spec.digest, salt.fingerprint)
        # 3.
        registry = CollectorRegistry()
        counted = StreamMetrics(registry)
        if stream.metrics_port:
            stack.callback(metrics.serve(registry, stream.metrics_port))
        # 4.
        topics = Topics(kafka)
        stack.callback(topics.close)
        clicks = topics.describe(kafka.clicks_topic)
        topics.ensure(*plan.dead_letters(settings))
        topics.ensure(*plan.microbatches(settings))
        # 5.
        writer = open_writer(settings)
        stack.callback(writer.close)
        join = open_join(settings, salt, counted, stack) if tables_of(settings.attributes) else None
        # 6.
        parser, profiler = Parser(settings.events, salt), Profiler(store, spec, stream.cache_users)
        partitions = partitions_of(stream.shard, stream.shards, clicks.partitions)
        ends = topics.ends(kafka.clicks_topic)
        mine = {one: ends[one] for one in (ends if partitions is None else partitions)}
        gaps = accounts.missing(clicks.topic_id, store.positions(), mine)
        if gaps:
            empty = replace(parser.parse([]), ranges=accounts.as_ranges(gaps))
            write = partial(write_gaps, settings, writer, profiler.update(empty), spec.digest, salt.fingerprint)
            accounts.pass_gaps(store, gaps, consent, kafka.clicks_topic, time.time_ns() // 1_000_000, write)
        # 7.
        committed = store.positions()
        positions = {
            source.partition: after for source, after in committed.items() if source.topic_id == clicks.topic_id
        }
        if committed and not positions:
            logger.warning("topic %s is another one than before: reading it from its beginning", kafka.clicks_topic)
        reader = Reader(kafka, kafka.clicks_topic, partitions, positions)
        stack.callback(reader.close)
        shard = Shard(
            settings=settings,
            spec=spec,
            salt=salt.fingerprint,
            topic_id=clicks.topic_id,
            store=store,
            reader=reader,
            writer=writer,
            parser=parser,
            profiler=profiler,
            metrics=counted,
            committed=committed,
            labels=open_labels(settings, store, clicks.topic_id),
            closing=stack,
            join=join,
        )
        counted.gaps_accepted.inc(len(accounts.accepted(store)))
        accounts.show(store, counted)
        logger.info(
            "reading %s (%d partitions) from %s, feature spec %s",
            kafka.clicks_topic,
            clicks.partitions,
            {partition: positions[partition] for partition in sorted(positions)} or "its beginning",
            spec.digest[:12],
        )
        yield stack.enter_context(installed(shard))


def open_join(settings: Settings, salt: Salt, counted: StreamMetrics, stack: ExitStack) -> Join:
    """The attributes as the topics have them now, and their follower, which ends with `stack`.

    Raises:
        LogError: A topic is missing or cannot be read.
        StoreError: The store cannot be opened.
    """
    # Imported here, since the sink imports this module.
    from streaming.sink import letter_headers

    tables, wanted = tables_of(settings.attributes), settings.attributes
    store = open_anew(settings.stream_dir / ATTRIBUTES, settings.stream.map_gb << 30)
    report = letters(settings.kafka, counted, letter_headers, writes=settings.stream.shard == 0)
    topics = {"user": wanted.user_topic, "item": wanted.item_topic}
    followers = [
        AttributeFollower(settings.kafka, topics[side], table, salt, store, report, settings.events.max_event_bytes)
        for side, table in tables.items()
    ]
    join = Join(store, followers, tables, wanted.slices, counted)
    stack.callback(join.close)
    join.catch_up()
    join.start()
    return join


def open_writer(settings: Settings) -> Writer:
    """The shard's writer; it ends what a predecessor left open, and fences it.

    Raises:
        UnreachableBroker: No broker answered in time.
        LogError: The cluster refused.
    """
    return Writer(settings.kafka, transactional_id=transactional_id(settings.stream.shard))


def transactional_id(shard: int) -> str:
    """By which Kafka fences a zombie of the same shard.

    >>> transactional_id(0)
    'springtide-stream-0'
    """
    return f"springtide-stream-{shard}"


def partitions_of(shard: int, shards: int, partitions: int) -> list[int] | None:
    """The partitions that a shard reads; None is all, those made later included.

    >>> partitions_of(1, 2, 4), partitions_of(0, 1, 4)
    ([1, 3], None)
    """
    return None if shards == 1 else [one for one in range(partitions) if one % shards == shard]


def write_gaps(settings: Settings, writer: Writer, rows: Rows, spec: str, salt: str, now_ms: int) -> None:
    """Tells the readers of the training log about gaps: a micro-batch without rows, whose ranges name them."""
    stream, kafka = settings.stream, settings.kafka
    with writer.transaction():
        for value in encode_cut(Cut((rows,), now_ms), spec, salt, stream.cut_rows, stream.max_record_bytes):
            writer.send(kafka.microbatches_topic, 0, None, value, [], now_ms)


def check_identity(store: HistoryStore, spec: str, salt: str) -> None:
    """Binds a new store to the spec's digest and the salt's fingerprint, and holds an old one to them.

    Raises:
        SpecMismatch: The store was filled under another spec.
        SaltMismatch: The store was filled with another salt.
    """
    stored_spec, stored_salt = store.extra(SPEC), store.extra(SALT)
    if stored_spec is None and stored_salt is None:
        store.commit(Appends.none(), (), {SPEC: spec.encode(), SALT: salt.encode()})
        return
    if stored_salt != salt.encode():
        raise SaltMismatch.between(str(store.path), (stored_salt or b"").decode(), salt)
    if stored_spec != spec.encode():
        raise SpecMismatch(
            f"the histories belong to feature spec {(stored_spec or b'').decode()[:12]}, the settings make {spec[:12]}; "
            "put [features] and events.actions back, or choose another paths.state"
        )
