"""Opens the resources of a stream process, in the order in which a mistake does the least harm.

1. The directory with the store, which must have this salt; the features must be those of the model.
2. The metrics' port, then the kernels.
3. The topics; a missing topic of clicks is an error, the two others are created.
4. Control: the mask, and the branch of the training log.
5. The writer, which fences one with the same transactional id; attributes, read to the ends of their topics.
6. The histories are rolled back to the branch point, and erased users are removed from them.
7. Gaps that the operator accepts are passed and recorded; any other gap ends the process.
8. The reader, at the store's positions.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from functools import partial

from prometheus_client import CollectorRegistry

from state import metrics
from state.attributes.follower import AttributeFollower, Report
from state.attributes.store import AttributeStore
from state.attributes.values import tables_of
from state.compiled.preparing import Kernels
from state.config.settings import Settings
from state.events.identity import Salt
from state.events.parser import Parser
from state.features.mask import Mask
from state.features.spec import FeatureSpec
from state.history.rewinding import branch_of
from state.history.store import HistoryStore
from state.layout import ATTRIBUTES
from state.log import KERNELS, Log, Reader, TopicInfo, Topics, topic_plan
from state.log.accepted_gaps import Consent
from state.log.follow import Position
from state.metrics import StreamMetrics
from state.positions import Gap
from state.process import killpoints
from state.process.wall_clock import wall_ms
from state.registry.sharing import copying
from state.storage.measuring import offer
from state.storage.shares import STREAM, map_bytes
from state.storage.waiting import Room
from streaming import accounts, control
from streaming.attributes import Join
from streaming.context import Handle, JobContext, StreamContext, opened
from streaming.control import ControlWatch, roll_back_histories
from streaming.cut import Cut
from streaming.event_clock import EventClock
from streaming.histories import open_histories
from streaming.labels import open_labels, unused_kernels
from streaming.profile import Profiler
from streaming.truncation import Leaders, accept, fill, open_behind
from streaming.writer import ShardWriter, open_writer, report_to

logger = logging.getLogger(__name__)

NO_CONSENT = Consent()


@contextmanager
def open_shard(
    settings: Settings, consent: Consent = NO_CONSENT, stopping: threading.Event | None = None, log: Log | None = None
) -> Iterator[Handle[StreamContext]]:
    """Opens a stream process's context in the order of this module, and closes it in reverse order.

    Args:
        settings: The effective settings.
        consent: The losses that the operator accepts.
        stopping: Set by a signal; created here by default.
        log: Contains clicks and micro-batches; by default the cluster of the settings.

    Raises:
        LockHeld: Another process has the directory.
        ModelMismatch, SaltMismatch, SpecMismatch: See `streaming.histories.open_histories`.
        SettingsError, PortTaken: The salt cannot be read, or the metrics' port is in use.
        GapError: Positions were deleted, and the gap is not accepted.
        RegistryError, StoreError, LogError: Control, the store or Kafka cannot be read, or a topic is missing.
    """
    spec, stopping = FeatureSpec.from_settings(settings), stopping or threading.Event()
    log = log or Log(settings.kafka)
    with ExitStack() as stack:
        # 1.
        store, salt = stack.enter_context(open_histories(settings, spec))
        # 2.
        counted, room = serve_metrics(settings, stack, stopping)
        # 3.
        clicks = ensure_topics(settings, topics := stack.enter_context(log.topics()))
        # 4.
        desired = (watch := ControlWatch(settings.registry_dir, branch_of(store))).desired
        # 5.
        writer = ShardWriter(settings, spec.digest, salt.fingerprint, stopping, partial(open_writer, log=log), desired)
        stack.callback(writer.close)
        now_ms = wall_ms()
        join = open_join(settings, salt, counted, stack, control.compaction_is_due(store, desired.mask.erased, now_ms))
        # 6.
        writer.skip_letters(roll_back_histories(log, settings, spec, store, desired))
        watch.open_again_in(control.apply_erasures(store, settings.registry_dir, desired.mask.erased, now_ms))
        # 7.
        job = open_job(settings, spec, store, salt, clicks.topic_id, desired.mask)
        gaps = accounts.missing(clicks.topic_id, store.positions(), topics.ends(settings.kafka.clicks_topic))
        write = partial(write_gaps, writer, job.parser, job.profiler)
        accounts.pass_gaps(store, gaps, consent, settings.kafka.clicks_topic, now_ms, write)
        # 8.
        leaders = Leaders(settings.stream_dir)
        reader = stack.enter_context(open_reader(log, settings, store, clicks, leaders, topics, consent))
        context = StreamContext(
            **{one.name: getattr(job, one.name) for one in fields(job)},
            topic_id=clicks.topic_id,
            reader=reader,
            leaders=leaders,
            writer=writer,
            metrics=counted,
            room=room,
            join=join,
            closing=stack,
            stopping=stopping,
            watch=watch,
        )
        say_where(context, clicks)
        yield stack.enter_context(opened(context))


def open_job(
    settings: Settings, spec: FeatureSpec, store: HistoryStore, salt: Salt, topic_id: str, mask: Mask
) -> JobContext:
    """Creates the context that turns the shard's clicks into rows, starting from the state of the store."""
    return JobContext(
        settings=settings,
        spec=spec,
        store=store,
        parser=Parser(settings.events, salt),
        profiler=Profiler(store, spec, settings.stream.cache_users, mask),
        clock=EventClock(store.extra),
        labels=open_labels(settings, store, topic_id),
        mask=mask,
    )


def serve_metrics(settings: Settings, stack: ExitStack, stopping: threading.Event) -> tuple[StreamMetrics, Room]:
    """Serves this process's metrics on `stream.metrics_port` (0: off) until `stack` closes.

    Returns:
        The metrics, and the waits for disk space.

    Raises:
        PortTaken: The port is in use.
    """
    registry = CollectorRegistry()
    counted, storage = StreamMetrics(registry), offer(registry, settings, [STREAM])
    if port := settings.stream.metrics_port:
        stack.callback(metrics.serve(registry, port, settings.metrics.host))
    stack.enter_context(copying(settings, registry, first=stopping))
    Kernels(registry, logger, unused_kernels(settings), [KERNELS]).prepare(stopping.is_set)
    return counted, Room(STREAM, storage, stopping.wait)


def ensure_topics(settings: Settings, topics: Topics) -> TopicInfo:
    """Creates the topics that the stream writes to, and describes the one it reads.

    Raises:
        LogError: The topic of clicks is missing, or Kafka is unreachable.
    """
    clicks = topics.describe(settings.kafka.clicks_topic)
    topics.ensure(*topic_plan.dead_letters(settings))
    topics.ensure(*topic_plan.microbatches(settings))
    return clicks


def write_gaps(writer: ShardWriter, parser: Parser, profiler: Profiler, found: Sequence[Gap], now_ms: int) -> None:
    """Reports gaps to readers of the training log: a micro-batch without rows, whose ranges name them."""
    nothing = replace(parser.parse([]), ranges=accounts.as_ranges(found))
    writer.write_once(Cut((profiler.update(nothing),), now_ms))


def open_join(
    settings: Settings,
    salt: Salt,
    counted: StreamMetrics,
    stack: ExitStack,
    anew: bool = False,
    reports: Callable[[str], Report] | None = None,
) -> Join | None:
    """Opens the attributes, up to date with their topics, and their follower; None if none are configured.

    The follower ends with `stack`. With `anew` the store of attributes is rewritten without free pages. `reports`
    returns the handler for the refused records of a topic; by default they become dead letters.

    Raises:
        LogError: A topic is missing or cannot be read.
        StoreError: The store cannot be opened.
    """
    tables, wanted = tables_of(settings.attributes), settings.attributes
    if not tables:
        return None
    folder = settings.stream_dir / ATTRIBUTES
    store = AttributeStore.open_anew(folder, map_bytes(settings, STREAM, ATTRIBUTES, folder))
    reports = reports or (lambda topic: report_to(settings.kafka, counted))
    topics = {"user": wanted.user_topic, "item": wanted.item_topic}
    followers = [
        AttributeFollower(
            settings.kafka, topics[side], table, salt, store, reports(topics[side]), settings.events.max_event_bytes
        )
        for side, table in tables.items()
    ]
    join = Join(store, followers, tables, wanted.slices, counted)
    stack.callback(join.close)
    join.catch_up()
    if anew:
        store.compact()
    join.start()
    return join


def open_reader(
    log: Log,
    settings: Settings,
    store: HistoryStore,
    clicks: TopicInfo,
    leaders: Leaders,
    topics: Topics,
    consent: Consent,
) -> Reader:
    """Opens the clicks of all partitions, including later ones, at the positions of the store.

    Raises:
        TruncatedLog: The log was truncated before those positions, and the loss is not accepted.
        LogError: Kafka is unreachable.
    """
    kafka = settings.kafka
    positions = accounts.positions_in(store, clicks.topic_id)
    if store.positions() and not positions:
        logger.warning("topic %s is another one than before: reading it from its beginning", kafka.clicks_topic)

    position = Position(clicks.topic_id, positions, leaders.at(clicks.topic_id, positions))
    accepts = partial(accept, store, consent, wall_ms())
    fills = partial(fill, kafka, topics, log.writer)
    reader = open_behind(log, kafka.clicks_topic, None, position, accepts, fills)
    killpoints.reach("stream.opened")
    return reader


def say_where(context: StreamContext, clicks: TopicInfo) -> None:
    """Shows the account, logs the start positions, and sets the metric of gaps ever accepted."""
    accounts.show(context.store, context.metrics)
    context.metrics.gaps_accepted.inc(len(accounts.accepted(context.store)))
    positions = accounts.positions_in(context.store, clicks.topic_id)
    logger.info(
        "reading %s (%d partitions) from %s, feature spec %s",
        context.settings.kafka.clicks_topic,
        clicks.partitions,
        {partition: positions[partition] for partition in sorted(positions)} or "its beginning",
        context.spec.digest[:12],
    )
