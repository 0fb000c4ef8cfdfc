"""Takes records of the training log, steps, publishes, and converges to control: the only writer of weights.

The weights are a function of (base, log range, mask). Whatever happens in
between, a restart or a rollback, comes down to one thing: load a version and
read on from its place in the log.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from state import layout
from state.config.settings import Settings
from state.errors import GapError, MicroBatchError, UnknownTopic, WrongEpoch
from state.log import LogReader
from state.log.accepted_gaps import Journal
from state.log.gaps import Consent
from state.metrics import TrainerMetrics
from state.positions import Source
from state.process import killpoints
from state.registry.control import Control
from state.registry.manifest import Draft, Kind, LogRange, Manifest
from state.registry.registry import Registry
from trainer import accounts
from trainer.accounts import Passages
from trainer.engine.guard import Verdict
from trainer.engine.step import Trainer
from trainer.intake import take_in
from trainer.versions import checkpoint, content
from trainer.versions.publisher import Publisher

CONTROL_S = 0.05
RECORDS = 32
NO_CONSENT = Consent()
logger = logging.getLogger(__name__)


OpenLog = Callable[[int | None], LogReader]
"""Opens the training log at an offset; None is its beginning."""


@dataclass
class Place:
    """Where the trainer is: one consistent cut together with its weights.

    Attributes:
        epoch: Control's epoch.
        parent: The newest version of this line.
        first: Where the log goes on after `parent`.
        next: Where the log goes on now.
        marks: The next offset of each source.
        rows: Rows read on this line.
        duplicate: Of them, rows dropped as seen before.
        masked: Of them, rows left out by a mask.
        gap: Source positions that no record held, a loss that was accepted.
        before: Source positions before the first one of this line, summed over sources.
        changed: Whether there was a step since `parent`.
    """

    epoch: int
    parent: int
    first: int
    next: int
    marks: dict[Source, int] = field(default_factory=dict)
    rows: int = 0
    duplicate: int = 0
    masked: int = 0
    gap: int = 0
    before: int = 0
    changed: bool = False


class Learner:
    """Everything between the training log and the registry. One thread.

    Args:
        settings: All settings.
        registry: Where versions and control are; the trainer's lock is held.
        trainer: The weights and the step.
        open_log: Opens the training log.
        program: SHA-256 of the program that fits the model.
        spec: Digest of the feature spec.
        about: What the bootstrap wrote about it.
        metrics: What is counted.
        clock: Wall clock in seconds, for times in manifests.
        elapsed: Monotonic seconds, for the pace of publishing.
        consent: The losses that the operator accepts.
    """

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        trainer: Trainer,
        open_log: OpenLog,
        program: str,
        spec: str,
        about: Mapping[str, Any],
        metrics: TrainerMetrics,
        clock: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = time.monotonic,
        consent: Consent = NO_CONSENT,
    ) -> None:
        self._settings, self._registry, self._trainer = settings, registry, trainer
        self._open_log, self._program, self._spec, self._about = open_log, program, spec, about
        self._metrics, self._clock, self._elapsed = metrics, clock, elapsed
        self._environment = checkpoint.environment(settings, trainer.device)
        self._passages = Passages(Journal(registry.path / layout.GAPS), consent, metrics, clock)
        self._faults: tuple[str, ...] = ()
        self._publisher = Publisher(registry.path, metrics)
        self._log: LogReader | None = None
        self._looked = self._published = float("-inf")
        self.control: Control
        self.place: Place
        self.caught_up = False

    # Entering an epoch

    def enter(self, control: Control) -> None:
        """Becomes the trainer that `control` wants: the newest version of its epoch, else its base, else nothing.

        Raises:
            UnknownVersion: The base is not kept.
            CorruptVersion: The base fails its digest.
            UnknownTopic: The training log was made anew since that version.
            GapError: The log does not reach back to that version any more, and nobody accepted it.
        """
        self.control = control
        found = self._registry.newest_good(control.epoch)
        version = control.base if found is None else found
        if self._log is not None:
            self._log.close()
        if version is None:
            self._log = self._open_log(None)
            self._begin(control)
        else:
            restored = checkpoint.restore(self._registry, version, self._trainer, self._spec)
            self._log, at = self._open_behind_gaps(restored)
            self._place_at(restored, at)
        self.caught_up = False
        self._published = self._elapsed()
        self._metrics.epoch.set(control.epoch)
        self._metrics.version.set(self.place.parent)
        self._metrics.held.set(self._trainer.guard.held)
        logger.info(
            "epoch %d: at version %d, reading the training log from offset %d",
            *(control.epoch, self.place.parent, self.place.next),
        )

    def _begin(self, control: Control) -> None:
        """Starts from nothing and publishes that as the first base: serving has something to answer with."""
        checkpoint.begin(self._trainer, self._about)
        begin = self._reader.position(self._settings.trainer.partition)
        self.place = Place(control.epoch, parent=0, first=begin, next=begin)
        tensors = checkpoint.full(self._trainer)
        made = self._registry.publish(self._draft("base"), content.encode(tensors))
        self.place.parent = made.version

    def _open_behind_gaps(self, restored: Manifest) -> tuple[LogReader, int]:
        """The log where `restored` goes on, or behind what was accepted as lost there; and that offset."""
        at = self._passages.past(Source(restored.log.topic_id, restored.log.partition), restored.log.next)
        try:
            return self._open_log(at), at
        except GapError as error:
            at = self._passages.pass_log(error, restored.marks)
            return self._open_log(at), at

    def _place_at(self, restored: Manifest, at: int) -> None:
        if restored.log.topic_id != self._reader.topic_id:
            raise UnknownTopic(
                f"version {restored.version} was trained on topic id {restored.log.topic_id}, {restored.log.topic} is now "
                f"{self._reader.topic_id}: it was deleted and made again; start a new state directory, or restore the topic"
            )
        self.place = Place(self.control.epoch, restored.version, restored.log.next, at, restored.marks)
        for name in ("rows", "duplicate", "masked", "gap", "before"):
            setattr(self.place, name, int(restored.metrics.get(f"account.{name}", 0)))

    # Learning

    def tick(self, wait_s: float, stopping: Callable[[], bool] = lambda: False) -> int:
        """Looks at control, takes what the log has, publishes what is due; returns the records taken.

        Raises:
            GapError: Records or clicks are gone, and nobody accepted it.
            LogError: The log cannot be read on.
            MicroBatchError: A record is not what a stream writes.
            RegistryError: A version needed cannot be loaded.
        """
        if self._between():
            return 0
        if self._trainer.guard.held:
            time.sleep(min(wait_s, CONTROL_S))
            return 0
        taken = 0
        try:
            batches = self._reader.poll(wait_s, RECORDS)
        except GapError as error:
            at = self._passages.pass_log(error, self.place.marks)
            self._reader.close()
            self._log, self.place.next = self._open_log(at), at
            return 0
        for batch in batches:
            if batch.corrupt:
                raise MicroBatchError(f"{self._where(batch.corrupt[0][0])} cannot be read: {batch.corrupt[0][2]}")
            for offset, value in zip(batch.offsets.tolist(), batch.values, strict=True):
                self._take(offset, value)
                taken += 1
                if self._between():
                    return taken
                if stopping() or self._trainer.guard.held:
                    # What was polled and not taken is polled again.
                    self._reader.seek(self._settings.trainer.partition, self.place.next)
                    return taken
            self.place.next = batch.next
        lag = self._reader.lag().get(self._settings.trainer.partition, 0)
        self._metrics.lag_records.set(lag)
        if lag == 0 and not self.caught_up:
            self.caught_up = True
            logger.info("epoch %d: caught up at offset %d", self.place.epoch, self.place.next)
        self._metrics.caught_up.set(self.caught_up)
        self._faults = accounts.show(self._account(), self._metrics, self._faults)
        return taken

    def _account(self) -> dict[str, int]:
        """What became of the rows of the training log, since this line began."""
        place, counters = self.place, self._trainer.counters
        counted = {name: getattr(place, name) for name in ("rows", "duplicate", "masked", "gap", "before")}
        return {**counted, "trained": counters.trained, "skipped": counters.skipped}

    def _take(self, offset: int, value: bytes | None) -> None:
        """One record is one step, where a row is left to learn from."""
        place, metrics = self.place, self._metrics
        found = take_in(
            value, place.marks, self.control.mask, self._spec, str(self._about["salt"]), self._where(offset)
        )
        place.gap += self._passages.pass_sources(found.gaps, self._where(offset), self._reader.topic_id)
        place.before += sum(part.first for part in found.batch.header.ranges if part.source not in place.marks)
        place.marks, place.next = found.marks, offset + 1
        place.rows += found.rows
        place.duplicate += found.duplicate
        place.masked += found.masked
        metrics.rows.labels("duplicate").inc(found.duplicate)
        metrics.rows.labels("masked").inc(found.masked)
        if len(found.batch) == 0:
            return
        report = self._trainer.step(found.batch)
        place.changed = True
        killpoints.reach("loop.stepped")
        metrics.steps.inc()
        metrics.step_seconds.observe(report.seconds)
        metrics.guard.labels(report.verdict.value).inc()
        metrics.rows.labels("trained" if report.verdict is Verdict.ACCEPT else "skipped").inc(report.rows)
        if report.verdict is Verdict.HOLD:
            metrics.held.set(1)
            logger.error(
                "training is held: %d steps in a row were bad, the last at offset %d (loss %.3g, gradient norm %.3g); "
                "look at the clicks, then `springtide rollback --to V --skip PARTITION:A-B --reason TEXT`",
                *(self._trainer.guard.skipped, offset, report.interest_log_loss, report.grad_norm),
            )

    def _between(self) -> bool:
        """Between two records: settle, publish if due, converge to control; True where the epoch changed."""
        try:
            self._settle()
            if (
                self.place.changed
                and not self._publisher.busy
                and self._elapsed() - self._published >= self._settings.trainer.publish_s
            ):
                self.publish()
        except WrongEpoch as refused:
            logger.info("%s", refused)
            self._looked = float("-inf")
        if self._elapsed() - self._looked < CONTROL_S:
            return False
        self._looked = self._elapsed()
        control = self._registry.control()
        if control is None or control == self.control:
            return False
        logger.info("control %d: %s by %s (%s)", control.generation, control.action, control.actor, control.reason)
        if control.epoch == self.place.epoch:
            self.control = control
            if self._trainer.guard.held and control.action != "pin":
                self._trainer.guard = replace(self._trainer.guard, held=False, skipped=0)
                self._metrics.held.set(0)
                logger.info("training goes on from offset %d", self.place.next)
            return False
        try:
            self._settle(wait=True)
        except WrongEpoch as refused:
            logger.info("%s", refused)
        self.enter(control)
        return True

    # Publishing

    def publish(self) -> None:
        """Hands what changed to the publisher; the copy is made here, in the step thread."""
        began = time.perf_counter()
        tensors = checkpoint.changes(self._trainer)
        draft = self._draft("delta")
        self._metrics.publish_stall_seconds.observe(time.perf_counter() - began)
        self._publisher.offer(draft, tensors)
        self._published = self._elapsed()
        self.place.changed = False
        self.place.first = self.place.next
        for name, table in self._trainer.tables.items():
            self._metrics.table_rows.labels(name).set(len(table))
        for gauge, name in (
            (self._metrics.log_loss, "log_loss"),
            (self._metrics.auc, "auc"),
            (self._metrics.top1_ratio, "top1"),
        ):
            gauge.set(draft.metrics.get(name, float("nan")))
        self._show_slices()

    def _show_slices(self) -> None:
        """Sets the gauges of the slices; a value may have got its name meanwhile."""
        shown = {
            "rows": self._metrics.slice_rows,
            "log_loss": self._metrics.slice_log_loss,
            "auc": self._metrics.slice_auc,
        }
        for gauge in shown.values() if self._trainer.slices else ():
            gauge.clear()
        for one in self._trainer.slices.measures():
            for name in shown.keys() & one.figures.keys():
                shown[name].labels(one.attribute, one.value).set(one.figures[name])

    def _settle(self, wait: bool = False) -> None:
        made = self._publisher.settle(wait)
        if made is not None:
            self.place.parent = made.version
            self._metrics.version.set(made.version)

    def close(self) -> None:
        """Publishes what is left and ends; the next start goes on from here.

        Raises:
            OSError: The disk refused.
        """
        try:
            self._settle(wait=True)
            if self.place.changed:
                self.publish()
                self._settle(wait=True)
        except WrongEpoch as refused:
            logger.info("%s", refused)
        finally:
            self._publisher.close()
            self._reader.close()

    def _draft(self, kind: Kind) -> Draft:
        place, counters, kafka = self.place, self._trainer.counters, self._settings.kafka
        return Draft(
            kind=kind,
            epoch=place.epoch,
            parent=place.parent or None,
            log=LogRange(
                kafka.microbatches_topic,
                self._reader.topic_id,
                self._settings.trainer.partition,
                place.first,
                place.next,
            ),
            sources=tuple(place.marks.items()),
            steps=counters.steps,
            rows=counters.trained,
            created_at_ms=int(self._clock() * 1000),
            event_time_ms=counters.event_time_ms,
            spec=self._spec,
            program=self._program,
            salt=str(self._about["salt"]),
            mask_generation=self.control.mask.generation,
            metrics=self._trainer.evaluation.values()
            | self._trainer.slices.values()
            | {f"account.{name}": float(value) for name, value in self._account().items()},
            environment=self._environment,
        )

    @property
    def _reader(self) -> LogReader:
        if self._log is None:
            raise RuntimeError("enter an epoch first")
        return self._log

    def _where(self, offset: int) -> str:
        return f"{self._settings.kafka.microbatches_topic}:{self._settings.trainer.partition} offset {offset}"
