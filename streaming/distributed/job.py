"""The distributed job as one sentence, and how it is handed to an engine.

    read ─┬─ (bucket, portion) ─ update bucket ─ write ─── account
          └─ of each source                 └── one stage ──┘   └─ one key

The engine keeps positions, clocks, histories, rows that wait and the account in
one checkpoint; what is behind a checkpoint is read and made again.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Mapping
from typing import Any, cast

import apache_beam as beam
from apache_beam.coders import BytesCoder
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.pvalue import PCollection
from apache_beam.runners.runner import PipelineResult
from apache_beam.transforms.periodicsequence import PeriodicImpulse, RebaseMode
from apache_beam.transforms.userstate import ReadModifyWriteStateSpec

from state.config.settings import Settings
from state.errors import SettingsError
from state.events.identity import own_salt
from state.features.spec import FeatureSpec
from state.log import KafkaLog, Log, topic_plan
from state.log.gaps import Consent
from state.registry.model_fit import require_same_features
from streaming.distributed.account import Account
from streaming.distributed.bucket import BucketRows
from streaming.distributed.buckets import allowed
from streaming.distributed.showing import Showing
from streaming.distributed.sink import WriteBuckets
from streaming.distributed.steps import ReadPartitions, UpdateBuckets, WorkerStep
from streaming.distributed.wire import unpack
from streaming.distributed.worker import JobPlan, without_secrets

NO_CONSENT = Consent()
WAKE_S = 3600.0
logger = logging.getLogger(__name__)


class KeepAccount(WorkerStep):
    """Keeps the account of all buckets under one key, and shows it."""

    ACCOUNT = ReadModifyWriteStateSpec("account", BytesCoder())

    def process(
        self,
        element: tuple[int, bytes],
        kept: Any = beam.DoFn.StateParam(ACCOUNT),  # noqa: B008  # Beam reads the default
    ) -> Iterator[None]:
        """Takes what was written of a bundle."""
        told, _ = unpack(element[1])
        account = Account.from_bytes(kept.read())
        account.take_bundle(told)
        kept.write(account.to_bytes())
        worker = self.worker
        # Of the process, not of this step: an engine lets steps go that had nothing to do for a minute.
        showing = cast(Showing, worker.kept("showing", lambda: Showing(worker)))
        showing.take(account, told)
        yield from ()


class WakeSources(beam.DoFn):
    """Wakes each source.

    Args:
        sources: How many there are.
    """

    def __init__(self, sources: int) -> None:
        super().__init__()
        self._sources = sources

    def process(self, element: object) -> Iterator[tuple[int, bytes]]:
        """The number of each is its key."""
        for source in range(self._sources):
            yield source, b""


def build_distributed(pipeline: beam.Pipeline, plan: JobPlan) -> PCollection[None]:
    """Applies the job to `pipeline`."""
    woken, portion, told = tuple[int, bytes], tuple[int, bytes], tuple[int, bytes]
    # Sources call themselves. But where input ends an engine forgets what it keeps of keys, and Flink is busy with timers.
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
    """What the steps are told, once what would stop them was looked at.

    Args:
        settings: The effective settings.
        consent: The losses that the operator accepts.
        until: By partition where reading ends; None for never.
        log: Where the topics are; the cluster of the settings where none is given.

    Raises:
        ModelMismatch: The features are others than what was learned, and nobody asked for an upgrade.
        SettingsError: Users cannot be divided into so many buckets.
        MissingSalt: The salt of what is stored here is gone.
        LogError: The topic of clicks is missing, or Kafka is not reachable.
    """
    buckets = settings.stream.buckets
    if not allowed(buckets):
        raise SettingsError(f"stream.buckets {buckets} is no divisor of 64", "take 1, 2, 4, 8, 16, 32 or 64")
    FeatureSpec.from_settings(settings)
    require_same_features(settings)
    salt = own_salt(settings)
    with (log or KafkaLog(settings.kafka)).topics() as topics:
        topics.describe(settings.kafka.clicks_topic)
        topics.ensure(*topic_plan.dead_letters(settings))
        topics.ensure(*topic_plan.microbatches(settings))
    return JobPlan(secrets.token_hex(8), without_secrets(settings), salt.fingerprint, consent, until)


def run_distributed(plan: JobPlan, options: PipelineOptions) -> PipelineResult:
    """Hands the job to the engine that `options` name; returns its handle at once where the engine is elsewhere."""
    pipeline = beam.Pipeline(options=options)
    build_distributed(pipeline, plan)
    return pipeline.run()
