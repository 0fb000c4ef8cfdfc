"""The resources that the steps of a distributed job share in one process; the first step that needs one opens it."""

from __future__ import annotations

import atexit
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Protocol

from prometheus_client import CollectorRegistry

from state.attributes.follower import Report
from state.config.sections import Kafka
from state.config.settings import Settings, known_settings, variable
from state.errors import SaltMismatch
from state.events.decoding import DeadLetter
from state.events.identity import Salt, load_salt
from state.features.mask import Mask
from state.features.spec import FeatureSpec
from state.kernels import Kernels
from state.log import KERNELS, Log
from state.log.accepted_gaps import Consent
from state.metrics import StreamMetrics
from state.registry.controls import Controls
from state.registry.sharing import copying
from streaming.attributes import Join
from streaming.context import open_join
from streaming.distributed.bucket import BucketCore, Buckets
from streaming.labels import unused_kernels
from streaming.rows import Rows
from streaming.writer import report_to

MASKS_KEPT = 8
logger = logging.getLogger(__name__)


def report_once(kafka: Kafka, topic: str, log: Log, report: Report, reports: Callable[[], bool]) -> Report:
    """Returns a handler that reports the refused records of a topic of attributes, each one once.

    The progress is stored as offsets of a separate group. `reports` returns whether this process reports.
    """
    group = f"{kafka.group}-attribute-letters"

    def report_new(bad: Sequence[DeadLetter]) -> None:
        if not reports():
            return
        with log.topics() as topics:
            reported = topics.committed(group, topic)
            new = [letter for letter in bad if letter.offset >= reported.get(letter.source.partition, 0)]
            if new:
                report(new)
                # Of each partition the last offset counts.
                in_order = sorted(new, key=lambda letter: letter.offset)
                ends = {letter.source.partition: letter.offset + 1 for letter in in_order}
                topics.commit(group, topic, ends)

    return report_new


class Closable(Protocol):
    """A resource that is kept open between bundles."""

    def close(self) -> None:
        """Closes it."""


@dataclass(frozen=True)
class JobPlan:
    """The parameters of every step, fixed when the job is submitted.

    Attributes:
        settings: The effective settings, without secrets: each process has those in its own environment.
        salt: Fingerprint of the salt, which each process reads from `paths.salt_file`.
        consent: The losses that the operator accepts.
        until: By partition the offset at which reading ends; None for never.
    """

    job: str
    settings: Settings
    salt: str
    consent: Consent = field(default_factory=Consent)
    until: Mapping[int, int] | None = None


def without_secrets(settings: Settings) -> Settings:
    """The settings as a job carries them, without secrets: an engine stores and shows submitted jobs.

    >>> from state.config.sections import Kafka
    >>> without_secrets(Settings(kafka=Kafka(sasl_password="x"))).kafka.sasl_password
    ''
    """
    return replace(_with(settings, {setting.name: "" for setting in known_settings() if setting.secret}), origins={})


def with_secrets(settings: Settings, env: Mapping[str, str]) -> Settings:
    """The settings with the secrets of a process's environment.

    >>> with_secrets(Settings(), {"SPRINGTIDE_KAFKA_SASL_PASSWORD": "x"}).kafka.sasl_password
    'x'
    """
    secrets = {setting.name: variable(setting.name) for setting in known_settings() if setting.secret}
    return _with(settings, {name: env[named] for name, named in secrets.items() if named in env})


def _with(settings: Settings, values: Mapping[str, str]) -> Settings:
    for name, value in values.items():
        section, _, key = name.partition(".")
        settings = replace(settings, **{section: replace(getattr(settings, section), **{key: value})})
    return settings


class JobWorker:
    """The resources of one process for a job. Any thread.

    Args:
        log: The log of clicks and micro-batches; by default the cluster of the settings.
        join: The attributes of users and items; by default read from their topics, if these are configured.

    Raises:
        MissingSalt, SettingsError: The salt is missing on this host, or cannot be read.
        SaltMismatch: It differs from the salt where the job was submitted.
    """

    def __init__(self, plan: JobPlan, log: Log | None = None, join: Join | None = None) -> None:
        self.plan = plan
        self.settings = with_secrets(plan.settings, os.environ)
        self.spec = FeatureSpec.from_settings(self.settings)
        self.log = log or Log(self.settings.kafka)
        self.salt: Salt = load_salt(self.settings.salt_path, create=False)
        if self.salt.fingerprint != plan.salt:
            raise SaltMismatch.between(str(self.settings.salt_path), self.salt.fingerprint, plan.salt)
        self.registry = CollectorRegistry()
        self.metrics = StreamMetrics(self.registry)
        open_core = partial(BucketCore, self.settings, self.spec, plan.salt)
        self.buckets = Buckets(open_core, self.spec.history)
        self.closing = ExitStack()
        self._lock, self._joining = threading.Lock(), threading.Lock()
        self._reading: dict[int, Closable] = {}
        controls = Controls(self.settings.registry_dir)
        self._mask_at = lru_cache(MASKS_KEPT)(lambda generation: controls.generation(generation).mask)
        self._join = self._given_join = join
        self._following, self._reports = ExitStack(), False
        self._kept: dict[str, Closable] = {}
        # A remote host has a copy of control, and reads nothing before it has polled for it.
        self.closing.enter_context(copying(self.settings, self.registry, first=threading.Event()))
        Kernels(self.registry, logger, unused_kernels(self.settings), [KERNELS]).prepare()

    def mask_of(self, control: int) -> Mask:
        """The mask of a generation of control; empty for generation 0.

        Raises:
            CorruptVersion: The registry does not have it.
        """
        return self._mask_at(control) if control else Mask.NONE

    def join(self, rows: Rows) -> Rows:
        """The rows with the present attributes of users and items; unchanged if none are configured."""
        settings = self.settings.attributes
        if not (settings.user_topic or settings.item_topic):
            return rows
        with self._joining:
            self._join = self._join or self._open_join()
            return self._join.rows(rows)

    def report_dead_letters(self) -> None:
        """Makes this process report refused records of attributes; it first reads earlier records again."""
        with self._joining:
            if not self._reports:
                self._reports, self._join = True, self._given_join
                self._following.close()

    def _open_join(self) -> Join:
        scratch = self._following.enter_context(tempfile.TemporaryDirectory(prefix="springtide-attributes-"))
        own_paths = replace(self.settings, paths=replace(self.settings.paths, state=scratch))
        kafka, metrics = self.settings.kafka, self.metrics

        def reports(topic: str) -> Report:
            return report_once(kafka, topic, self.log, report_to(kafka, metrics), lambda: self._reports)

        join = open_join(own_paths, self.salt, metrics, self._following, reports=reports)
        assert join is not None, "called only if topics are configured"
        return join

    def take_reading(self, source: int) -> Closable | None:
        """Takes the open partitions of a source for exclusive use; None if this process has none."""
        with self._lock:
            return self._reading.pop(source, None)

    def keep_reading(self, source: int, partitions: Closable) -> None:
        """Returns the open partitions of a source after exclusive use."""
        with self._lock:
            before, self._reading[source] = self._reading.get(source), partitions
        if before is not None:
            before.close()

    def kept(self, name: str, opens: Callable[[], Closable]) -> Closable:
        """A resource that this process opens once, at the first request; it ends with the worker."""
        with self._lock:
            if name not in self._kept:
                self._kept[name] = opens()
            return self._kept[name]

    def close(self) -> None:
        """Closes the readers and stops the threads."""
        with self._lock:
            opened = [*self._reading.values(), *self._kept.values()]
            self._reading, self._kept = {}, {}
        for resource in opened:
            resource.close()
        self.buckets.clear()
        self._following.close()
        self.closing.close()


_worker: JobWorker | None = None
_opening = threading.Lock()


def worker_of(plan: JobPlan, log: Log | None = None, join: Join | None = None) -> JobWorker:
    """This process's worker of a job; closes workers of other jobs, because a process serves one job at a time.

    `log` and `join` of `JobWorker` are used if the worker is opened here.
    """
    global _worker
    with _opening:
        if _worker is None or _worker.plan.job != plan.job:
            close_workers()
            _worker = JobWorker(plan, log, join)
        return _worker


def close_workers() -> None:
    """Closes the worker of this process."""
    global _worker
    if _worker is not None:
        _worker.close()
        _worker = None


atexit.register(close_workers)
