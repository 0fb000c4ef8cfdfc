"""The resources of one stream process, and the order in which they are opened.

`open_stream` opens them so that a mistake is found before it does harm:

1. The directory with the store, which must have this salt; the features must be those of the model.
2. The metrics' port, then the kernels.
3. The topics; a missing topic of clicks is an error, and the two others are created if they are missing.
4. Control: the mask, and the branch of the training log.
5. The writer, which fences any other with the same transactional id; attributes, read to the ends of their topics.
6. The histories are rolled back to the branch point, and erased users are removed from them.
7. Gaps that the operator accepts are recorded and skipped; any other gap ends the process.
8. The reader, at the store's positions.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

from prometheus_client import CollectorRegistry

from state import metrics
from state.attributes.follower import AttributeFollower, Report
from state.attributes.values import AttributeStore, tables_of
from state.config.settings import Settings
from state.events.identity import Salt
from state.events.parser import EventBatch, Parser
from state.features.mask import Mask
from state.features.spec import FeatureSpec
from state.history.rewinding import branch_of
from state.history.store import HistoryStore
from state.history.waiting import Changes, Extra
from state.kernels import Kernels
from state.layout import ATTRIBUTES
from state.log import KERNELS, Log, PartitionBatch, Reader, TopicInfo, Topics, topic_plan
from state.log.accepted_gaps import Consent
from state.log.follow import Position
from state.metrics import StreamMetrics
from state.positions import Gap
from state.process import killpoints
from state.process.environment import wall_ms
from state.registry.sharing import copying
from state.storage import STREAM, Room, map_bytes, offer
from streaming import accounts, control
from streaming.accounts import Leaders
from streaming.attributes import Join
from streaming.control import ControlWatch, roll_back_histories
from streaming.event_clock import EventClock
from streaming.histories import open_histories
from streaming.labels import Labels, open_labels, unused_kernels
from streaming.profile import Profiler
from streaming.rows import Cut, Cutter, Encoding, Rows, in_order, leave_out
from streaming.writer import StreamWriter, open_writer, report_to

logger = logging.getLogger(__name__)

NO_CONSENT = Consent()


@dataclass(frozen=True, kw_only=True)
class JobContext:
    """The objects that turn records into rows, in the stream, the bootstrap and a rebuild.

    The Beam thread uses it. The commit thread uses the store, notifies the profiler of commits, and looks up labels.

    Attributes:
        store: Histories, positions and waiting impressions.
        labels: Waiting impressions; None if none can wait.
        join: Attributes of users and items; None if none are configured.
    """

    settings: Settings
    spec: FeatureSpec
    store: HistoryStore
    parser: Parser
    profiler: Profiler
    clock: EventClock
    labels: Labels | None
    join: Join | None = None
    mask: Mask = Mask.NONE

    def parse(self, batches: Sequence[PartitionBatch]) -> EventBatch:
        """Decodes, validates and pseudonymises records; bad ones become dead letters, masked ones are left out."""
        return leave_out(self.parser.parse(batches), self.mask)

    def make_rows(self, batch: EventBatch, now_ms: int) -> Rows:
        """Computes a batch's rows in order of arrival: event clock, windows, then attributes, then delayed labels."""
        batch, clock = in_order(batch, self.clock.follow(batch, batch.ranges, now_ms))
        rows = replace(self.profiler.update(batch), clock=clock)
        if self.join is not None:
            rows = self.join.rows(rows)
        return rows if self.labels is None else self.labels.attribute(rows)

    def complete(self, rows: Rows, waiting: Changes, extra: Extra) -> Rows:
        """Completes rows for a micro-batch, see `Labels.complete`."""
        return rows if self.labels is None else self.labels.complete(rows, waiting, extra)

    def commit(self, rows: Rows) -> Rows:
        """Commits rows to the store without a micro-batch; returns them complete.

        Raises:
            CorruptStore: The store lacks a waiting impression.
            PositionConflict: The rows do not start at the store's positions.
            StoreFull: The store or its disk is full.
        """
        waiting: Changes = {}
        extra: Extra = {}
        rows = self.complete(rows, waiting, extra)
        state = {} if rows.clock is None else rows.clock.state
        self.store.commit(rows.appends, rows.batch.ranges, {**extra, **state}, waiting)
        self.profiler.committed(rows)
        return rows


@dataclass(frozen=True, kw_only=True)
class StreamContext(JobContext):
    """All resources of one stream process; created by `open_stream`.

    Attributes:
        reader: Reads the clicks; used by the Beam thread only, except for `commit_group` and `leader_epoch`.
        cutter: Collects rows into cuts, and decides when to poll; used by the Beam thread only.
        leaders: Leader epoch of the newest click before each position; used by the commit thread only.
        writer: Writes micro-batches and dead letters; used by the commit thread only.
        room: Lets a commit wait for disk space; used by the commit thread only.
        closing: Callbacks that run, last in first out, before the above is closed.
        stopping: Set by a signal; no further poll begins then.
        watch: Control, as polled by the Beam thread; no further poll begins once it has changed.
    """

    topic_id: str
    reader: Reader
    cutter: Cutter
    leaders: Leaders
    writer: StreamWriter
    metrics: StreamMetrics
    room: Room
    closing: ExitStack
    stopping: threading.Event
    watch: ControlWatch


@contextmanager
def open_stream(
    settings: Settings, consent: Consent = NO_CONSENT, stopping: threading.Event | None = None, log: Log | None = None
) -> Iterator[StreamContext]:
    """Opens a stream process's context in the order of this module, and closes it in reverse order.

    `stopping` is set by a signal. `log` contains clicks and micro-batches; by default it is the cluster of the settings.

    Raises:
        LockHeld: Another process has the directory.
        ModelMismatch, SaltMismatch, SpecMismatch: See `streaming.histories.open_histories`.
        SettingsError, PortTaken: The salt cannot be read, or the metrics' port is in use.
        GapError: Positions were deleted, and the operator's `consent` does not cover the gap.
        RegistryError, StoreError, LogError: Control, the store or Kafka cannot be read, or a topic is missing.
    """
    spec, stopping = FeatureSpec.from_settings(settings), stopping or threading.Event()
    log = log or Log(settings.kafka)
    with ExitStack() as stack:
        # 1.
        store, salt = stack.enter_context(open_histories(settings, spec))
        # 2.
        metrics, room = _serve_metrics(settings, stack, stopping)
        # 3.
        topics = stack.enter_context(log.topics())
        clicks = ensure_topics(settings, topics)
        # 4.
        watch = ControlWatch(settings.registry_dir, branch_of(store))
        desired = watch.desired
        # 5.
        encoding = Encoding.of(
            settings.stream, spec.digest, salt.fingerprint, desired.mask.generation, desired.log_epoch
        )
        writer = StreamWriter(settings, encoding, stopping, partial(open_writer, log=log))
        stack.callback(writer.close)
        now_ms = wall_ms()
        erased = desired.mask.erased
        join = open_join(settings, salt, metrics, stack, control.compaction_is_due(store, erased, now_ms))
        # 6.
        writer.skip_dead_letters(roll_back_histories(log, settings, spec, store, desired))
        watch.open_again_in(control.apply_erasures(store, settings.registry_dir, erased, now_ms))
        # 7.
        job = replace(open_job(settings, store, salt, clicks.topic_id, desired.mask), join=join)
        gaps = accounts.missing(clicks.topic_id, store.positions(), topics.ends(settings.kafka.clicks_topic))
        write = partial(_write_gaps, writer, job)
        accounts.pass_gaps(store, gaps, consent, settings.kafka.clicks_topic, now_ms, write)
        # 8.
        leaders = Leaders(settings.stream_dir)
        positions = accounts.positions_in(store, clicks.topic_id)
        if store.positions() and not positions:
            logger.warning("topic %s was recreated: reading it from its beginning", settings.kafka.clicks_topic)
        reader = accounts.open_clicks(
            log,
            settings.kafka,
            None,
            Position(clicks.topic_id, positions, leaders.at(clicks.topic_id, positions)),
            partial(accounts.accept_truncation, store, consent, now_ms),
        )
        stack.enter_context(reader)
        killpoints.reach("stream.opened")
        context = StreamContext(
            **vars(job),
            topic_id=clicks.topic_id,
            reader=reader,
            cutter=Cutter(settings.stream.cut_rows, settings.stream.cut_ms),
            leaders=leaders,
            writer=writer,
            metrics=metrics,
            room=room,
            closing=stack,
            stopping=stopping,
            watch=watch,
        )
        _report_start(context, clicks)
        yield context


def open_job(settings: Settings, store: HistoryStore, salt: Salt, topic_id: str, mask: Mask = Mask.NONE) -> JobContext:
    """Creates a job context without attributes, starting from the state of the store."""
    spec = FeatureSpec.from_settings(settings)
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


def _serve_metrics(settings: Settings, stack: ExitStack, stopping: threading.Event) -> tuple[StreamMetrics, Room]:
    """Serves the metrics until `stack` closes, and prepares the kernels."""
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


def _write_gaps(writer: StreamWriter, job: JobContext, gaps: Sequence[Gap], now_ms: int) -> None:
    nothing = replace(job.parser.parse([]), ranges=accounts.as_ranges(gaps))
    writer.write([Cut((job.profiler.update(nothing),), now_ms)], patient=False)


def open_join(
    settings: Settings,
    salt: Salt,
    metrics: StreamMetrics,
    stack: ExitStack,
    rewrite: bool = False,
    reports: Callable[[str], Report] | None = None,
) -> Join | None:
    """Opens the attributes, up to date with their topics, and their follower; None if none are configured.

    `stack` ends the follower. `rewrite` rewrites the store without free pages. `reports` returns what handles the refused
    records of a topic; by default they become dead letters.

    Raises:
        LogError: A topic is missing or cannot be read.
        StoreError: The store cannot be opened.
    """
    tables, wanted = tables_of(settings.attributes), settings.attributes
    if not tables:
        return None
    folder = settings.stream_dir / ATTRIBUTES
    store = AttributeStore.open_or_rebuild(folder, map_bytes(settings, STREAM, ATTRIBUTES, folder))
    reports = reports or (lambda topic: report_to(settings.kafka, metrics))
    topics = {"user": wanted.user_topic, "item": wanted.item_topic}
    followers = [
        AttributeFollower(settings.kafka, topics[side], table, salt, store, reports(topics[side]))
        for side, table in tables.items()
    ]
    join = Join(store, followers, tables, wanted.slices, metrics)
    stack.callback(join.close)
    join.catch_up()
    if rewrite:
        store.compact()
    join.start()
    return join


def _report_start(context: StreamContext, clicks: TopicInfo) -> None:
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
