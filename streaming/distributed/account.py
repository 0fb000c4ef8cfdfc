"""Writes the rows of a distributed job, keeps the account of all buckets, and publishes it.

The sink writes the rows of a bundle, acknowledged before the bundle ends:

    process        gathers
    finish_bundle  1. cuts and encodes   2. writes, acknowledged   3. reports to the account

An engine that rolls back a bundle computes its rows again, and readers drop these duplicates by their positions. A
partition counts as read up to the lowest position of any of its buckets. Each offset is counted by the bucket of its
user, and an offset without a user by the first bucket.

`Publisher` publishes once a second, even when no clicks arrive. If the account's key has moved to another process, the
group is ahead of this process, which then releases the metrics port.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import apache_beam as beam
from apache_beam.coders import BytesCoder
from apache_beam.transforms.userstate import ReadModifyWriteStateSpec
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.timestamp import Timestamp
from apache_beam.utils.windowed_value import WindowedValue

from state import metrics
from state.accounts import StreamAccount, check_accounts
from state.disk.files import HOST
from state.errors import PortTaken, PositionConflict, SpringtideError, UnreachableBroker
from state.events.decoding import DeadLetter
from state.history.chunks import Counts, advanced_counts, summed_counts
from state.log import Writer
from state.positions import Range, Source
from state.process.environment import wall_ms
from state.registry.hosts import ErasureReport
from streaming.accounts import show_faults, show_totals
from streaming.commit import CommitReport, truncated_columns
from streaming.control import report_erasures
from streaming.distributed.bucket import BucketRows, decode, encode, stored
from streaming.distributed.steps import WorkerStep
from streaming.distributed.worker import JobWorker
from streaming.rows import Cut, Encoding, encode_cut
from streaming.writer import send_records

SHOW_S = 1.0
PART, WHERE = "stream-job", "the engine's state"  # of the report of erasures
ACCOUNT = 0  # the only key of the step that keeps the account
TRIES = 10
WAIT_S = 1.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BundleReport:
    """The sink's report of a bundle.

    Attributes:
        written: What it wrote; the ranges include those without positions, of impressions that no longer wait.
        appended_ms: When Kafka received the newest click; 0 for none.
        users: By bucket the number of users with a history.
        erased: By bucket the last erasure that it has applied.
    """

    written: CommitReport
    appended_ms: int
    users: dict[int, int]
    erased: dict[int, int]

    @classmethod
    def of(cls, buckets: Sequence[BucketRows], records: int, seconds: float, truncated: Sequence[int]) -> BundleReport:
        """Summarises a bundle; see `CommitReport.of`."""
        written = CommitReport.of([bucket.rows for bucket in buckets], records, seconds, truncated)
        ranges = tuple(part for bucket in buckets for part in (*bucket.dropped, *bucket.rows.batch.ranges))
        return cls(
            replace(written, ranges=ranges),
            max((bucket.appended_ms for bucket in buckets), default=0),
            {bucket.bucket: bucket.users for bucket in buckets},
            {bucket.bucket: bucket.erased for bucket in buckets},
        )


@dataclass
class Account:
    """The counts of all buckets.

    Attributes:
        counts: By source, counted as in the histories of the local stream.
        conflicts: Ranges that did not continue from their source's position: the engine lost or repeated something.
        erased: By bucket the last erasure that it has applied.
    """

    counts: dict[Source, Counts] = field(default_factory=dict)
    conflicts: int = 0
    erased: dict[int, int] = field(default_factory=dict)

    def take_bundle(self, report: BundleReport) -> None:
        """Takes the report of a bundle."""
        self.take(report.written.ranges)
        self.erased |= report.erased

    def take(self, ranges: Iterable[Range]) -> None:
        """Takes ranges, those of one source in order."""
        for part in ranges:
            before = self.counts.get(part.source)
            try:
                self.counts[part.source] = advanced_counts(before, part, "the account")
            except PositionConflict:
                assert before is not None
                self.conflicts += 1
                self.counts[part.source] = advanced_counts({**before, "next": part.first}, part, "the account")

    def reached(self, topic_id: str) -> dict[int, int]:
        """By partition of a topic, the offset up to which all buckets have read it."""
        ends: dict[int, list[int]] = {}
        wanted: dict[int, int] = {}
        for source, counts in self.counts.items():
            if source.topic_id == topic_id:
                ends.setdefault(source.partition, []).append(counts["next"])
                wanted[source.partition] = source.buckets
        return {partition: min(nexts) for partition, nexts in sorted(ends.items()) if len(nexts) >= wanted[partition]}

    def forgotten(self, buckets: int) -> int:
        """The last erasure that all `buckets` buckets have applied."""
        return min(self.erased.get(bucket, 0) for bucket in range(buckets))

    @property
    def totals(self) -> Counts:
        """Outcomes over all sources, see `summed`."""
        return summed_counts(self.counts.values())

    @property
    def waiting(self) -> int:
        """Impressions that wait for their label."""
        return sum(StreamAccount.of(counts).waiting for counts in self.counts.values())

    def faults(self) -> tuple[str, ...]:
        """The faults: ranges that did not continue, and partitions whose buckets do not add up to their offsets."""
        faults = [f"{self.conflicts} ranges did not begin where their bucket was"] if self.conflicts else []
        partitions: dict[tuple[str, int, int], list[Mapping[str, int]]] = {}
        for source, counts in self.counts.items():
            faults += [f"{source}: {fault}" for fault in check_accounts(StreamAccount.of(counts))]
            partitions.setdefault((source.topic_id, source.partition, source.buckets), []).append(counts)
        for (topic_id, partition, buckets), bucket_counts in partitions.items():
            spans = {(counts["first"], counts["next"]) for counts in bucket_counts}
            # While some buckets are ahead of others, their parts do not add up.
            if len(spans) == 1 and len(bucket_counts) == buckets:
                ((first, after),) = spans
                passed = summed_counts(bucket_counts)["positions"]
                if passed != after - first:
                    faults.append(
                        f"{topic_id}:{partition}: {after - first} offsets, and its buckets have {passed} of their own"
                    )
        return tuple(faults)


class Publisher:
    """Publishes the account and the metrics of a worker. `take` is called by one thread at a time, `close` by any."""

    def __init__(self, worker: JobWorker) -> None:
        self._worker, self._settings, self._metrics = worker, worker.settings, worker.metrics
        self._latest: Account | None = None
        self._is_new = False
        self._users: dict[int, int] = {}
        self._appended_ms = 0
        self._committed: Mapping[int, int] = {}
        self._faults: tuple[str, ...] = ()
        self._warned: dict[str, str] = {}
        self._forgotten: int | None = None
        self._stop_offering: Callable[[], None] | None = None
        self._stopping = threading.Event()
        metrics.add_process(worker.registry)
        self._thread = threading.Thread(target=self._run, name="account", daemon=True)
        self._thread.start()

    def take(self, account: Account, report: BundleReport) -> None:
        """Takes the account after a bundle, and counts the bundle."""
        report.written.count(self._metrics)
        self._users |= report.users
        self._appended_ms = max(self._appended_ms, report.appended_ms)
        self._latest, self._is_new = account, True

    def close(self) -> None:
        """Publishes the last account, and ends the thread."""
        self._stopping.set()
        self._thread.join()
        self.show()
        self._leave_port()

    def show(self) -> None:
        """Sets the gauges and commits the group's offsets; an unreachable cluster is logged once, and retried."""
        account, is_new = self._latest, self._is_new
        if account is None:
            return
        self._is_new = False
        self._take_port()
        show_totals(self._metrics, account.totals, account.waiting)
        self._metrics.history_users.set(sum(self._users.values()))
        self._faults = show_faults(self._metrics, account.faults(), self._faults)
        self._report_erasures(account.forgotten(self._settings.stream.buckets))
        self._commit_group(account, is_new)

    def _report_erasures(self, through: int) -> None:
        registry = self._settings.registry_dir
        if through == self._forgotten or not registry.is_dir():
            return
        applied = ErasureReport(PART, HOST, WHERE, through, through, 0, wall_ms())
        if report_erasures(registry, applied, partial(self._warn, "erasures")):
            self._forgotten = through
            self._warned.pop("erasures", None)

    def _take_port(self) -> None:
        port = self._settings.stream.metrics_port
        if not port or self._stop_offering is not None:
            return
        try:
            self._stop_offering = metrics.offer(self._worker.registry, port, self._settings.metrics.host)
            self._warned.pop("port", None)
        except PortTaken as error:
            self._warn("port", f"the stream's metrics are not shown yet: {error}")

    def _leave_port(self) -> None:
        if self._stop_offering is not None:
            self._stop_offering()
            self._stop_offering = None

    def _commit_group(self, account: Account, is_new: bool) -> None:
        kafka = self._settings.kafka
        try:
            with self._worker.log.topics() as topics:
                reached = account.reached(topics.describe(kafka.clicks_topic).topic_id)
                committed = {} if is_new else topics.committed(kafka.group, kafka.clicks_topic)
                if any(committed.get(partition, 0) > position for partition, position in reached.items()):
                    # Clicks may come here again meanwhile.
                    if self._latest is account:
                        self._latest = None
                    self._leave_port()
                    logger.info("another process has the account now, and publishes it")
                    return
                if reached and reached != self._committed:
                    topics.commit(kafka.group, kafka.clicks_topic, reached)
                    self._committed = reached
                ends = topics.ends(kafka.clicks_topic)
        except SpringtideError as error:
            self._warn("group", f"offsets of group {kafka.group} are not up to date: {error}")
            return
        self._warned.pop("group", None)
        lag = sum(max(0, end - reached.get(partition, begin)) for partition, (begin, end) in ends.items())
        self._metrics.lag_events.set(lag)
        self._metrics.lag_seconds.set(max(0.0, time.time() - self._appended_ms / 1000) if lag else 0.0)

    def _warn(self, problem: str, warning: str) -> None:
        if warning != self._warned.get(problem):
            logger.warning("%s", warning)
        self._warned[problem] = warning

    def _run(self) -> None:
        while not self._stopping.wait(SHOW_S):
            try:
                self.show()
            # The edge of the thread: a failure to publish must not end the job.
            except Exception:
                logger.exception("the account cannot be shown")


def records_of(buckets: Sequence[BucketRows], worker: JobWorker, now_ms: int) -> list[bytes]:
    """The micro-batches of a bundle; rows under different masks or epochs of the log are not mixed."""
    groups: dict[Encoding, list[BucketRows]] = {}
    stream, spec, salt = worker.settings.stream, worker.spec.digest, worker.salt.fingerprint
    for bucket in buckets:
        # A portion without ranges only reported an erasure to its bucket.
        if bucket.rows.batch.ranges:
            encoding = Encoding.of(stream, spec, salt, bucket.mask_generation, bucket.log_epoch)
            groups.setdefault(encoding, []).append(bucket)
    return [
        value
        for encoding, group in groups.items()
        for value in encode_cut(Cut(tuple(bucket.rows for bucket in group), now_ms), encoding)
    ]


class WriteBuckets(WorkerStep):
    """Writes the rows of a bundle, and emits the report for the account."""

    _writer: Writer | None = None

    def start_bundle(self) -> None:
        """Starts with no gathered rows."""
        self._buckets: list[BucketRows] = []

    def process(self, element: BucketRows) -> Iterator[tuple[int, bytes]]:
        """Gathers."""
        self._buckets.append(element)
        yield from ()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        """Writes the gathered rows.

        Raises:
            LogError: The cluster refused, or was unreachable for long: the engine rolls back to its checkpoint.
        """
        buckets, self._buckets = self._buckets, []
        if not buckets:
            return
        worker, begun_s = self.worker, time.perf_counter()
        now_ms = wall_ms()
        values = records_of(buckets, worker, now_ms)
        letters = [letter for bucket in buckets for letter in bucket.rows.batch.dead]
        self._write(worker, values, letters, now_ms)
        truncated = truncated_columns(worker.spec.names)
        report = BundleReport.of(buckets, len(values), time.perf_counter() - begun_s, truncated)
        yield WindowedValue((ACCOUNT, encode(report)), Timestamp.now(), (GlobalWindow(),))

    def teardown(self) -> None:
        """Closes the connection."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, worker: JobWorker, values: Sequence[bytes], letters: Sequence[DeadLetter], now_ms: int) -> None:
        """Writes, acknowledged when it returns. If the outcome is unknown, a new writer writes again."""
        for tries_left in reversed(range(TRIES)):
            try:
                self._writer = self._writer or worker.log.writer()
                send_records(self._writer, worker.settings.kafka, values, letters, now_ms)
                self._writer.flush()
                return
            except UnreachableBroker as error:
                if self._writer is not None:
                    self._writer.close(0.0)
                self._writer = None
                if not tries_left:
                    raise
                logger.warning("%s; these rows are written again as soon as it is back", error)
                time.sleep(WAIT_S)


class KeepAccount(WorkerStep):
    """Keeps the account of all buckets under one key, and publishes it."""

    ACCOUNT = ReadModifyWriteStateSpec("account", BytesCoder())

    def process(
        self,
        element: tuple[int, bytes],
        state: Any = beam.DoFn.StateParam(ACCOUNT),  # noqa: B008  # Beam reads the default
    ) -> Iterator[None]:
        """Takes the report of a bundle."""
        report = decode(element[1], BundleReport)
        account = stored(state, Account)
        account.take_bundle(report)
        state.write(encode(account))
        worker = self.worker
        # Owned by the process, not by this step: an engine drops steps that were idle for a minute.
        publisher = cast(Publisher, worker.kept("publisher", lambda: Publisher(worker)))
        publisher.take(account, report)
        yield from ()
