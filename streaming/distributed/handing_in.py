"""Submits the distributed job to an engine and follows it: the command `springtide stream --runner ...`.

On Flink the job runs on the cluster. This process reports its progress, and ending this process does not end the job.
A job is stopped by savepoint (`springtide flink down`), or cancelled on the cluster. On Prism, which is for tests and
experiments, the job ends with this process.

    read ─┬─ (bucket, portion) ─ update bucket ─ write ─── account
          └─ of each source                 └── one stage ──┘   └─ one key

The engine keeps positions, clocks, histories, waiting rows and the account in one checkpoint. Everything after a
checkpoint is read and computed again after a failure.

The sink puts the rows that the buckets of a bundle made into micro-batches. They are acknowledged before the bundle
ends:

    process        gathers
    finish_bundle  1. cuts and encodes   2. writes, acknowledged   3. reports to the account

An engine that rolls back a bundle makes its rows again, perhaps in other bundles; readers drop them by their
positions. Each writer of a bucket's rows started from a checkpoint, before which all of them were acknowledged. So
the log has all of a bucket's positions up to the newest, even if an older writer is still active.

`Account` has the fate of each click position, over all buckets. A partition counts as read up to the lowest position
of any of its buckets. Each offset is counted by the bucket of its user; an offset without a user by the first bucket.

`Showing` publishes what is committed: the gauges of the account, the lag, the group's offsets for lag tools, and the
progress of erasures. The process that has the account's one key does so once a second, in a thread. So the committed
state is shown even when no clicks arrive. If the key has moved to another process, the group is ahead of this one.
This process then leaves the metrics port to the other.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import apache_beam as beam
import grpc
from apache_beam.coders import BytesCoder
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions
from apache_beam.pvalue import PCollection
from apache_beam.runners.runner import PipelineResult, PipelineState
from apache_beam.transforms.periodicsequence import PeriodicImpulse, RebaseMode
from apache_beam.transforms.userstate import ReadModifyWriteStateSpec
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.timestamp import Timestamp
from apache_beam.utils.windowed_value import WindowedValue

from state import metrics
from state.accounts import StreamAccount, check_accounts
from state.config.settings import Settings
from state.disk.files import HOST
from state.errors import JobFailed, PortTaken, PositionConflict, SettingsError, SpringtideError, UnreachableBroker
from state.events.dead_letters import DeadLetter
from state.events.identity import own_salt
from state.features.spec import FeatureSpec
from state.history.counts import Counts, advanced, summed
from state.log import Log, Writer, topic_plan
from state.log.accepted_gaps import Consent
from state.metrics import StreamMetrics
from state.positions import UNPLACED, Range, Source, from_json, to_json
from state.process.wall_clock import wall_ms
from state.registry.erasing import ErasureReport
from state.registry.model_fit import require_same_model
from streaming.accounts import show_faults, show_totals
from streaming.commit import off_clocks, show_off_clock
from streaming.control import report_erasures
from streaming.cut import Cut, encode_cut
from streaming.distributed.bucket import BucketRows
from streaming.distributed.buckets import allowed, pack, unpack
from streaming.distributed.engine import FLINK, FlinkJob, beam_options
from streaming.distributed.steps import ReadPartitions, UpdateBuckets, WorkerStep
from streaming.distributed.worker import JobPlan, JobWorker, without_secrets
from streaming.event_clock import OffClock
from streaming.writer import send_letters

SHOW_S = 1.0
PART, WHERE = "stream-job", "the engine's state"  # of the report of erasures
ACCOUNT = 0  # the only key of the step that keeps the account
TRIES = 10
WAIT_S = 1.0
WAKE_S = 3600.0
LOOK_S = 0.5
NO_CONSENT = Consent()
logger = logging.getLogger(__name__)


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

    def take_bundle(self, told: Mapping[str, Any]) -> None:
        """Takes the sink's report of a bundle."""
        self.take(map(from_json, told["ranges"]))
        self.erased |= {int(bucket): erased for bucket, erased in told["erased"].items()}

    def take(self, ranges: Iterable[Range]) -> None:
        """Takes ranges, those of one source in order."""
        for part in ranges:
            before = self.counts.get(part.source)
            try:
                self.counts[part.source] = advanced(before, part, "the account")
            except PositionConflict:
                assert before is not None
                self.conflicts += 1
                self.counts[part.source] = advanced({**before, "next": part.first}, part, "the account")

    def reached(self, topic_id: str) -> dict[int, int]:
        """By partition of a topic the offset up to which all buckets have it."""
        found: dict[int, list[int]] = {}
        wanted: dict[int, int] = {}
        for source, counts in self.counts.items():
            if source.topic_id == topic_id:
                found.setdefault(source.partition, []).append(counts["next"])
                wanted[source.partition] = source.buckets
        return {one: min(nexts) for one, nexts in sorted(found.items()) if len(nexts) >= wanted[one]}

    def forgotten(self, buckets: int) -> int:
        """The last erasure that all of this many buckets have applied.

        >>> Account(erased={0: 2, 1: 1}).forgotten(2), Account(erased={0: 2}).forgotten(2)
        (1, 0)
        """
        return min(self.erased.get(bucket, 0) for bucket in range(buckets))

    @property
    def totals(self) -> Counts:
        """Outcomes over all sources, with `positions`, their sum."""
        return summed(self.counts.values())

    @property
    def waiting(self) -> int:
        """Impressions that wait for their label."""
        return sum(StreamAccount.of(one).waiting for one in self.counts.values())

    def faults(self) -> tuple[str, ...]:
        """The faults: ranges that did not continue, and partitions whose buckets do not add up to their offsets."""
        found = [f"{self.conflicts} ranges did not begin where their bucket was"] if self.conflicts else []
        partitions: dict[tuple[str, int, int], list[Mapping[str, int]]] = {}
        for source, counts in self.counts.items():
            found += [f"{source}: {fault}" for fault in check_accounts(StreamAccount.of(counts))]
            partitions.setdefault((source.topic_id, source.partition, source.buckets), []).append(counts)
        for (topic_id, partition, buckets), theirs in partitions.items():
            spans = {(one["first"], one["next"]) for one in theirs}
            # While some buckets are ahead of others, their parts do not add up.
            if len(spans) == 1 and len(theirs) == buckets:
                ((first, after),) = spans
                passed = summed(theirs)["positions"]
                if passed != after - first:
                    found.append(
                        f"{topic_id}:{partition}: {after - first} offsets, and its buckets have {passed} of their own"
                    )
        return tuple(found)

    def to_bytes(self) -> bytes:
        """The bytes that the engine keeps."""
        counts = {str(source): one for source, one in self.counts.items()}
        return json.dumps({"counts": counts, "conflicts": self.conflicts, "erased": self.erased}).encode()

    @classmethod
    def from_bytes(cls, value: bytes | None) -> Account:
        """Decodes the result of `to_bytes`; None is an empty account.

        >>> one = Account()
        >>> one.take([Range(Source("ab" * 16, 0, 1, 2), 5, 9, rows=1, elsewhere=3)])
        >>> Account.from_bytes(one.to_bytes()) == one, one.totals["positions"]
        (True, 1)
        """
        if value is None:
            return cls()
        told = json.loads(value)
        erased = {int(bucket): last for bucket, last in told["erased"].items()}
        return cls({Source.parse(source): one for source, one in told["counts"].items()}, told["conflicts"], erased)


class Showing:
    """Publishes the account. `take` is called by one thread at a time, `close` by any.

    Args:
        worker: Of this process: its metrics, and their address.
    """

    def __init__(self, worker: JobWorker) -> None:
        self._settings: Settings = worker.settings
        self._log: Log = worker.log
        self._metrics: StreamMetrics = worker.metrics
        self._worker = worker
        self._latest: Account | None = None
        self._is_new = False
        self._users: dict[str, int] = {}
        self._appended_ms = 0
        self._shown: Mapping[int, int] = {}
        self._faults: tuple[str, ...] = ()
        self._said: dict[str, str] = {}
        self._forgotten: int | None = None
        self._stop_offering: Callable[[], None] | None = None
        self._stopping = threading.Event()
        metrics.add_process(worker.registry)
        self._thread = threading.Thread(target=self._run, name="account", daemon=True)
        self._thread.start()

    def take(self, account: Account, told: Mapping[str, Any]) -> None:
        """Takes the account after a bundle, and counts the bundle."""
        counted = self._metrics
        counted.microbatches.inc(told["records"])
        counted.commit_seconds.observe(told["seconds"])
        if told["records"]:
            counted.microbatch_rows.observe(told["rows"] / told["records"])
        counted.truncated_histories.inc(told["truncated"])
        for reason, count in told["letters"].items():
            counted.dead_letters.labels(reason).inc(count)
        for part in told["ranges"]:
            for outcome, count in from_json(part).outcomes.items():
                if outcome not in (*UNPLACED, "elsewhere"):
                    counted.events.labels(outcome).inc(count)
        for off in told["off"]:
            show_off_clock(counted, OffClock(*off))
        self._users |= told["users"]
        self._appended_ms = max(self._appended_ms, told["appended_ms"])
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
        shown = self._metrics
        show_totals(shown, account.totals, account.waiting)
        shown.history_users.set(sum(self._users.values()))
        shown.cached_users.set(self._worker.cache.users)
        self._faults = show_faults(shown, account.faults(), self._faults)
        self._report(account.forgotten(self._settings.stream.buckets))
        self._tell(account, is_new)

    def _report(self, through: int) -> None:
        """Reports the last erasure that all buckets have applied; reports 0 too, so that the job is known."""
        registry = self._settings.registry_dir
        if through == self._forgotten or not registry.is_dir():
            return
        told = ErasureReport(PART, HOST, WHERE, through, through, 0, wall_ms())
        if report_erasures(registry, told, partial(self._say, "erasures")):
            self._forgotten = through
            self._said.pop("erasures", None)

    def _take_port(self) -> None:
        """Serves the metrics as soon as no other process of this host uses their port."""
        port = self._settings.stream.metrics_port
        if not port or self._stop_offering is not None:
            return
        try:
            self._stop_offering = metrics.offer(self._worker.registry, port, self._settings.metrics.host)
            self._said.pop("port", None)
        except PortTaken as error:
            self._say("port", f"the stream's metrics are not shown yet: {error}")

    def _leave_port(self) -> None:
        if self._stop_offering is not None:
            self._stop_offering()
            self._stop_offering = None

    def _tell(self, account: Account, is_new: bool) -> None:
        """Commits the offsets that all buckets have to the group, and sets the lag."""
        kafka = self._settings.kafka
        try:
            with self._log.topics() as topics:
                reached = account.reached(topics.describe(kafka.clicks_topic).topic_id)
                if not is_new and _is_behind(reached, topics.committed(kafka.group, kafka.clicks_topic)):
                    self._let_go(account)
                    return
                if reached and reached != self._shown:
                    topics.commit(kafka.group, kafka.clicks_topic, reached)
                    self._shown = reached
                ends = topics.ends(kafka.clicks_topic)
        except SpringtideError as error:
            self._say("group", f"offsets of group {kafka.group} are not up to date: {error}")
            return
        self._said.pop("group", None)
        lag = sum(max(0, end - reached.get(one, begin)) for one, (begin, end) in ends.items())
        self._metrics.lag_events.set(lag)
        self._metrics.lag_seconds.set(max(0.0, time.time() - self._appended_ms / 1000) if lag else 0.0)

    def _let_go(self, account: Account) -> None:
        """Stops publishing, unless clicks come here again."""
        if self._latest is account:
            self._latest = None
        self._leave_port()
        logger.info("another process has the account now, and shows it")

    def _say(self, what: str, warning: str) -> None:
        """Logs a problem, once as long as it stays the same."""
        if warning != self._said.get(what):
            logger.warning("%s", warning)
        self._said[what] = warning

    def _run(self) -> None:
        while not self._stopping.wait(SHOW_S):
            try:
                self.show()
            # The edge of the thread: a failure to publish must not end the job.
            except Exception:
                logger.exception("the account cannot be shown")


def _is_behind(ours: Mapping[int, int], group: Mapping[int, int]) -> bool:
    """Whether a group is ahead of this process in a partition that both know.

    >>> _is_behind({0: 5}, {0: 7, 1: 9}), _is_behind({0: 5}, {0: 5, 1: 9}), _is_behind({}, {0: 1})
    (True, False, False)
    """
    return any(group.get(partition, 0) > at for partition, at in ours.items())


def records_of(made: Sequence[BucketRows], worker: JobWorker, now_ms: int) -> list[bytes]:
    """The micro-batches of a bundle; rows under different masks or epochs of the log are not mixed.

    Raises:
        MicroBatchError: A row is larger than a record may be.
    """
    groups: dict[tuple[int, int], list[BucketRows]] = {}
    for one in made:
        # A portion without ranges only reported an erasure to its bucket.
        if not one.rows.batch.ranges:
            continue
        groups.setdefault((one.mask_generation, one.log_epoch), []).append(one)
    stream, values = worker.settings.stream, list[bytes]()
    for (generation, epoch), group in groups.items():
        cut = Cut(tuple(one.rows for one in group), now_ms)
        limits = stream.cut_rows, stream.max_record_bytes
        values += encode_cut(cut, worker.spec.digest, worker.salt.fingerprint, *limits, generation, epoch)
    return values


def told(made: Sequence[BucketRows], records: int, seconds: float, truncated: Sequence[int]) -> bytes:
    """The report of a bundle for the account.

    Args:
        made: Of the bundle, written.
        records: Micro-batches.
        seconds: Time that writing them took.
        truncated: The feature columns that mark truncated histories.
    """
    batches = [one.rows.batch for one in made]
    head: dict[str, Any] = {
        "ranges": [to_json(part) for one in made for part in (*one.dropped, *one.rows.batch.ranges)],
        "letters": Counter(str(letter.reason) for batch in batches for letter in batch.dead),
        "off": [off for one in made for off in off_clocks(one.rows)],
        "appended_ms": max((one.appended_ms for one in made), default=0),
        "records": records,
        "rows": sum(len(one.rows) for one in made),
        "truncated": sum(int((one.rows.vectors.features[:, at] > 0).sum()) for one in made for at in truncated),
        "seconds": seconds,
        "users": {str(one.bucket): one.users for one in made},
        "erased": {str(one.bucket): one.erased for one in made},
    }
    return pack(head, {})


class WriteBuckets(WorkerStep):
    """Writes the rows of a bundle, and emits the report for the account."""

    _writer: Writer | None = None

    def start_bundle(self) -> None:
        """Starts with no gathered rows."""
        self._made: list[BucketRows] = []

    def process(self, element: BucketRows) -> Iterator[tuple[int, bytes]]:
        """Gathers."""
        self._made.append(element)
        yield from ()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        """Writes the gathered rows.

        Raises:
            LogError: The cluster refused, or was unreachable for long: the engine rolls back to its checkpoint.
        """
        made, self._made = self._made, []
        if not made:
            return
        worker, begun_s = self.worker, time.perf_counter()
        now_ms = wall_ms()
        values = records_of(made, worker, now_ms)
        letters = [letter for one in made for letter in one.rows.batch.dead]
        self._write(worker, values, letters, now_ms)
        truncated = [at for at, name in enumerate(worker.spec.names) if name == "truncated"]
        value = told(made, len(values), time.perf_counter() - begun_s, truncated)
        yield WindowedValue((ACCOUNT, value), Timestamp.now(), (GlobalWindow(),))

    def teardown(self) -> None:
        """Closes the connection."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, worker: JobWorker, values: Sequence[bytes], letters: Sequence[DeadLetter], now_ms: int) -> None:
        """Writes, acknowledged when it returns; a broker that is briefly unreachable costs only time.

        If the outcome is unknown, a new writer writes again: records may then be in the log twice, with the same positions.
        """
        kafka = worker.settings.kafka
        for left in reversed(range(TRIES)):
            try:
                self._writer = writer = self._writer or worker.log.writer()
                for value in values:
                    writer.send(kafka.microbatches_topic, 0, None, value, [], now_ms)
                send_letters(writer, kafka.dead_letters_topic, letters, now_ms)
                writer.flush()
                return
            except UnreachableBroker as error:
                if self._writer is not None:
                    self._writer.close(0.0)
                self._writer = None
                if not left:
                    raise
                logger.warning("%s; these rows are written again as soon as it is back", error)
                time.sleep(WAIT_S)


class KeepAccount(WorkerStep):
    """Keeps the account of all buckets under one key, and publishes it."""

    ACCOUNT = ReadModifyWriteStateSpec("account", BytesCoder())

    def process(
        self,
        element: tuple[int, bytes],
        kept: Any = beam.DoFn.StateParam(ACCOUNT),  # noqa: B008  # Beam reads the default
    ) -> Iterator[None]:
        """Takes the report of a bundle."""
        told, _ = unpack(element[1])
        account = Account.from_bytes(kept.read())
        account.take_bundle(told)
        kept.write(account.to_bytes())
        worker = self.worker
        # Owned by the process, not by this step: an engine drops steps that were idle for a minute.
        showing = cast(Showing, worker.kept("showing", lambda: Showing(worker)))
        showing.take(account, told)
        yield from ()


class WakeSources(beam.DoFn):
    """Wakes each source."""

    def __init__(self, sources: int) -> None:
        super().__init__()
        self._sources = sources

    def process(self, element: object) -> Iterator[tuple[int, bytes]]:
        """Emits the number of each source as its key."""
        for source in range(self._sources):
            yield source, b""


def build_distributed(pipeline: beam.Pipeline, plan: JobPlan) -> PCollection[None]:
    """Applies the job to `pipeline`."""
    woken, portion, told = tuple[int, bytes], tuple[int, bytes], tuple[int, bytes]
    # Sources wake themselves. But when input ends, an engine drops the state of keys, and Flink is busy with timers.
    endless = PeriodicImpulse(fire_interval=WAKE_S, rebase=RebaseMode.REBASE_START)
    accounted: PCollection[None] = (
        pipeline
        | "Start" >> (endless if plan.until is None else beam.Impulse())
        | "Wake sources" >> beam.ParDo(WakeSources(plan.settings.stream.sources)).with_output_types(woken)
        | "Read partitions" >> beam.ParDo(ReadPartitions(plan)).with_output_types(portion)
        | "Update buckets" >> beam.ParDo(UpdateBuckets(plan)).with_output_types(BucketRows)
        | "Write buckets" >> beam.ParDo(WriteBuckets(plan)).with_output_types(told)
        | "Keep account" >> beam.ParDo(KeepAccount(plan))
    )
    return accounted


def plan_of(
    settings: Settings, consent: Consent = NO_CONSENT, until: Mapping[int, int] | None = None, log: Log | None = None
) -> JobPlan:
    """The plan for the steps; conditions that would stop them are checked first.

    Args:
        settings: The effective settings.
        consent: The losses that the operator accepts.
        until: By partition the offset at which reading ends; None for never.
        log: The log with the topics; by default the cluster of the settings.

    Raises:
        ModelMismatch: The features differ from the learned ones, and no upgrade was requested.
        SettingsError: Users cannot be divided into this many buckets.
        MissingSalt: The salt of the stored data is gone.
        LogError: The topic of clicks is missing, or Kafka is not reachable.
    """
    buckets = settings.stream.buckets
    if not allowed(buckets):
        raise SettingsError(f"stream.buckets {buckets} is no divisor of 64", "take 1, 2, 4, 8, 16, 32 or 64")
    FeatureSpec.from_settings(settings)
    require_same_model(settings, features_only=True)
    salt = own_salt(settings)
    with (log or Log(settings.kafka)).topics() as topics:
        topics.describe(settings.kafka.clicks_topic)
        topics.ensure(*topic_plan.dead_letters(settings))
        topics.ensure(*topic_plan.microbatches(settings))
    return JobPlan(secrets.token_hex(8), without_secrets(settings), salt.fingerprint, consent, until)


def run_distributed(plan: JobPlan, options: PipelineOptions) -> PipelineResult:
    """Submits the job to the engine that `options` name; returns its handle at once if the engine is remote."""
    pipeline = beam.Pipeline(options=options)
    build_distributed(pipeline, plan)
    return pipeline.run()


def run_elsewhere(
    settings: Settings, consent: Consent, runner: str, words: Sequence[str], stopping: threading.Event
) -> None:
    """Submits the job, and returns when it has ended, or when this process is asked to stop.

    Args:
        settings: The effective settings.
        consent: The losses that the operator accepts.
        runner: The runner's name as given.
        words: Options of Beam that were given.
        stopping: Set by a signal.

    Raises:
        JobFailed: The job could not be submitted, or has failed.
        SpringtideError: A condition that would stop the steps was found first.
    """
    plan = plan_of(settings, consent)
    logger.info("handing the job in to %s: %d buckets of users", runner, settings.stream.buckets)
    try:
        options = beam_options(runner, words, settings)
        named = options.view_as(GoogleCloudOptions)
        named.job_name = named.job_name or f"springtide-{plan.job}"
        result = run_distributed(plan, options)
    # Whatever a runner raises: gRPC's errors, those of a job server, of a library that is not installed.
    except Exception as error:
        raise JobFailed(
            f"the job cannot be handed in to {runner}: {_first_line(error)}",
            "see that the engine runs (`springtide flink status`), and that it is of Beam's release",
        ) from error
    local = not any(word.startswith("--job_endpoint") for word in words)
    job = FlinkJob.of(options, settings, local) if runner == FLINK else None
    follow(result, runner, stopping, job)


def follow(result: PipelineResult, runner: str, stopping: threading.Event, job: FlinkJob | None = None) -> None:
    """Logs the state of the job until it ends, or until this process is asked to stop.

    A job with a failure that no restart repairs is cancelled.

    Args:
        result: The runner's result.
        runner: The runner's name as given.
        stopping: Set by a signal.
        job: The same job as its JobManager knows it.

    Raises:
        JobFailed: It has failed, or its state cannot be read.
    """
    said = None
    while not stopping.wait(LOOK_S):
        state = _state_of(result, runner)
        if state != said:
            logger.info("the job is %s", str(state).lower())
            said = state
        if job is not None and (problem := job.unmended()):
            job.cancel()
            raise JobFailed(f"the job was cancelled, for it fails with what no restart mends: {problem}")
        if state is not None and PipelineState.is_terminal(state):
            _say_end(state, runner, job)
            return
    if runner == FLINK:
        logger.info("the job goes on; `springtide flink down` stops it by savepoint")
        return
    result.cancel()
    logger.info("the job is cancelled")


def _state_of(result: PipelineResult, runner: str) -> str | None:
    try:
        return cast(str | None, result.state)
    except grpc.RpcError as error:
        raise JobFailed(
            f"the job server of {runner} does not answer any more ({error.code().name})",
            "the job may go on without it: see the engine (`springtide flink status`)",
        ) from error


def _say_end(state: str, runner: str, job: FlinkJob | None) -> None:
    """Logs how an operator ended the job.

    Raises:
        JobFailed: No operator ended it, or its state cannot be read.
    """
    savepoint = None if job is None else job.ended_by()
    if savepoint:
        logger.info("the job was stopped by a savepoint; resume it with --savepoint_path=%s", savepoint)
    elif savepoint is not None:
        logger.info("the job was cancelled; `springtide flink status` names the checkpoint that it is resumed from")
    elif state in (PipelineState.FAILED, PipelineState.UNRECOGNIZED):
        # Beam also reports a job as failed that was cancelled with a savepoint.
        also = ", which is also said of one that was stopped by savepoint" if job is None else ""
        raise JobFailed(
            f"the job has ended on {runner}, {state.lower()}{also}",
            "read the engine's log; `springtide flink status` names what it is resumed from",
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
