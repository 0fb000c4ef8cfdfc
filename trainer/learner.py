"""Takes records of the training log, steps, publishes, and converges to control: the only writer of weights.

The weights are a function of (base, log range, mask). A restart or a rollback therefore comes down to one operation:
load a version and read on from its position in the log.

`PrivacyBudget` charges the ledger before records are learned, and holds training if too little of the budget is left.
A record is learned only under a charge for its period and its branch (`trainer/privacy/history.py`). The order matters:

1. The ledger is written. It also names an offset, `through`, before which records may have been learned. It is raised
   by `RESERVED` offsets at a time.
2. The record is learned.

A change at or after `through` costs no budget, because no record from there on was learned before.

`LossRecorder` records the loss of each row, as it was scored before it was learned, for comparison with another
trainer. Without a reader it neither writes nor copies anything (`state/experiments/comparison.py`).
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from state import layout
from state.config.settings import Settings
from state.errors import GapError, RegistryError, SettingsError, WrongEpoch
from state.experiments import comparison
from state.experiments.comparison import LossWriter, RowLosses
from state.log import Log, Reader
from state.log.accepted_gaps import Consent, Journal
from state.metrics import TrainerMetrics
from state.positions import Source
from state.process import killpoints, private_files
from state.process.said_once import SaidOnce
from state.registry import privacy_ledger
from state.registry.control import Control
from state.registry.log_line import onward
from state.registry.model_fit import former_specs
from state.registry.privacy_ledger import PrivacyLedger, PrivacyPeriod
from state.registry.registry import Registry
from state.storage.waiting import Room
from trainer import accounts, gauges
from trainer.accounts import Passages
from trainer.beginning import Begins, from_nothing
from trainer.catching_up import CatchingUp
from trainer.engine.guard import Verdict
from trainer.engine.report import Report
from trainer.engine.step import Trainer
from trainer.forgetting import take_up
from trainer.holding import UpdateGuard
from trainer.intake import Intake, former, take_in
from trainer.measures.breakdown import shown_of
from trainer.measures.step_scores import SUMS
from trainer.place import TrainingPlace
from trainer.privacy.key import own_key
from trainer.privacy.place import NoisePlace, environment_digest
from trainer.publications import Publications
from trainer.records import LogRecord, records_of, take_or_leave
from trainer.resume import resume
from trainer.versions.carrying import restore_or_carry
from trainer.versions.publisher import Drafter, Publisher

ROUNDING = 1e-6
"""Relative tolerance of epsilon above the budget: the precision of the search."""

RESERVED = 256
"""Offsets of the training log that one write of the ledger reserves."""

LOOK_S = 1.0
"""Between two checks for a reader of row losses."""

AGAIN_S = 10.0
"""Wait after a failed write of row losses."""

_LOG_LOSS = SUMS.index("log_loss")
CONTROL_S, RECORDS = 0.05, 32
NO_CONSENT = Consent()
logger = logging.getLogger(__name__)


class PrivacyBudget:
    """The budget of one trainer. The step thread calls every method.

    Args:
        settings: All settings; with `privacy.epsilon` 0 there is no budget.
        trainer: The trainer of the records.
        metrics: The trainer's metrics.
        environment: What the bits of a step depend on besides the log, as in manifests.

    Attributes:
        held: Whether training holds, because the next period would cost more than is left.
    """

    def __init__(
        self, settings: Settings, trainer: Trainer, metrics: TrainerMetrics, environment: Mapping[str, str]
    ) -> None:
        self._wanted, self._path, self._metrics = settings.privacy, settings.privacy_ledger_path, metrics
        self._trainer, self.held = trainer, False
        self._ledger: PrivacyLedger | None = None
        self._environment = environment_digest(environment)
        self._allowed: PrivacyPeriod | None = None
        self._learned: tuple[str, int] | None = None
        metrics.privacy_epsilon_limit.set(self._wanted.epsilon)
        if self._wanted.epsilon:
            # Not at the top: the accountant's import takes a second.
            from trainer.engine.private_step import PrivateTrainer

            assert isinstance(trainer, PrivateTrainer), "what trainer_of makes where a budget is set"
            self._private, self._key = trainer.private, private_files.fingerprint(own_key(settings))

    def enter(self) -> None:
        """At the beginning of an epoch, or after a start: reads the spent budget.

        Raises:
            RegistryError: The ledger is gone or damaged.
            SettingsError: It has another key, or another unit.
        """
        if not self._wanted.epsilon:
            return
        found, ours = privacy_ledger.read(self._path), (self._key, self._wanted.unit)
        if found is None and self._private.allowance.began:
            raise RegistryError(
                f"there is no ledger of the privacy budget at {self._path}, and versions were learned under one",
                "restore it from a backup, or begin a new state directory (paths.state)",
            )
        if found is not None and (found.key, found.unit) != ours:
            names = ("privacy.key_file", "privacy.unit")
            name, was, now = next(
                one for one in zip(names, (found.key, found.unit), ours, strict=True) if one[1] != one[2]
            )
            raise SettingsError(
                f"the ledger of the privacy budget at {self._path} has {was} for {name}, and the trainer has {now}",
                f"put {name} back, or begin a new state directory (paths.state)",
            )
        self._ledger, self.held = found or PrivacyLedger(*ours), False
        # Source and offset before which other trainers may have learned; None if there were none.
        self._learned = (self._ledger.source, self._ledger.through) if self._ledger.periods else None
        self._allowed = None
        self._show()

    def noise_place(self, found: Intake, source: Source, offset: int, control: Control) -> NoisePlace:
        """The identity of the record at `offset` for its noise.

        Args:
            found: The rows that are learned.
            source: Of the training log.
            offset: Of the record.
            control: The generation that the trainer follows.
        """
        mask = control.mask_at(found.batch.header.mask_generation)
        return NoisePlace(
            source.topic_id, source.partition, offset, control.epoch, control.log, mask, self._environment
        )

    def allows(self, at: NoisePlace, found: Intake, place: TrainingPlace, leader_epoch: int) -> bool:
        """Whether a record may be learned; when this returns True, the ledger has its charge durably.

        Args:
            at: Of `noise_place`.
            found: The rows that are learned; without rows there is no charge.
            place: The position before the record.
            leader_epoch: Kafka's epoch of the leader that wrote the record.

        Raises:
            OSError: The disk refused.
        """
        if self._ledger is None or not len(found.batch):
            return True
        self._metrics.privacy_rows_left_out.set(self._private.allowance.left_out)
        log_ms = max(self._trainer.counters.log_ms, int(found.batch.at_ms.max()))
        number = int(log_ms // (1000 * self._wanted.period_s)) if self._wanted.unit == "user" else 0
        # A rewritten log and accepted losses change which records a branch has; the history sees them only afterwards.
        lost = place.left_out + place.gap + sum(first - mark for _, mark, first in found.gaps)
        line = self._private.history.line_at(at) + f"leader {leader_epoch} lost {lost}".encode()
        name = hashlib.blake2b(line, digest_size=16).hexdigest()
        period = PrivacyPeriod(at.epoch, number, self._private.updates, self._private.noise, (name,))
        source = f"{at.topic_id}:{at.partition}"
        reserved = source == self._ledger.source and at.offset < self._ledger.through
        if period == self._allowed and reserved:
            return True
        ledger = self._ledger
        if not privacy_ledger.is_charged(ledger, period):
            again = self._learned is not None and (source != self._learned[0] or at.offset < self._learned[1])
            ledger = self._paid(privacy_ledger.charged(ledger, period, again))
        if not self.held and not reserved:
            ledger = msgspec.structs.replace(ledger, source=source, through=at.offset + RESERVED)
        if ledger != self._ledger:
            privacy_ledger.write(self._path, ledger)
        self._ledger, self._allowed = ledger, None if self.held else period
        self._show()
        return not self.held

    def _paid(self, ledger: PrivacyLedger) -> PrivacyLedger:
        """`ledger` with the cost of its charges; or the present one, held, if the cost exceeds the budget."""
        from trainer.privacy.accounting import spent

        assert self._ledger is not None
        wanted, present = self._wanted, self._ledger
        after, before = spent(ledger.periods, wanted.delta), spent(present.periods, wanted.delta)
        self.held = len(ledger.periods) > len(present.periods) and after > wanted.epsilon * (1.0 + ROUNDING)
        if self.held:
            logger.error(
                "training holds: the privacy budget is spent, epsilon %.3g of %.3g after %d periods; answers go on; see "
                "trainer/PRIVACY.md for what a larger budget means",
                *(before, wanted.epsilon, len(present.periods)),
            )
        return msgspec.structs.replace(
            present if self.held else ledger,
            epsilon=wanted.epsilon,
            delta=wanted.delta,
            spent=before if self.held else after,
            held=self.held,
        )

    def _show(self) -> None:
        if self._ledger is not None:
            self._metrics.privacy_epsilon_spent.set(self._ledger.spent)
            self._metrics.privacy_held.set(self.held)


class LossRecorder:
    """Writes the losses of one trainer. The step thread calls every method.

    Args:
        registry: The trainer's registry; its lock is held.
        elapsed: Monotonic seconds.
    """

    def __init__(self, registry: Path, elapsed: Callable[[], float] = time.monotonic) -> None:
        self._registry, self._elapsed = registry, elapsed
        self._look_s, self._writer = float("-inf"), LossWriter(registry)
        self._wanted = True
        self._say = SaidOnce(logger.warning)

    def take(self, offset: int, users: npt.NDArray[np.uint64], report: Report) -> None:
        """Writes the losses of an accepted step if there is a reader. After a disk error, logs it and pauses writing.

        A record with rows that the guard skipped is left out, because a comparison needs rows that both trainers learn.

        Args:
            offset: Of the record in the training log.
            users: `[n]` uint64, of the rows that the step took.
            report: Of the step.
        """
        if not self._is_wanted():
            return
        if report.verdict is not Verdict.ACCEPT:
            return
        targets = np.concatenate([one.targets for one in report.judged])
        losses = np.concatenate([one.rows[:, _LOG_LOSS] for one in report.judged])
        try:
            self._writer.append(RowLosses(offset, comparison.blocks_of(users[targets]), losses))
        except OSError as error:
            self._say(f"losses of rows are not written, and no experiment is compared meanwhile: {error}")
            self._wanted, self._look_s = False, self._elapsed() + AGAIN_S - LOOK_S

    def _is_wanted(self) -> bool:
        now_s = self._elapsed()
        if now_s - self._look_s >= LOOK_S:
            before, self._wanted = self._wanted, comparison.is_wanted(self._registry)
            self._look_s = now_s
            if before and not self._wanted:
                # Also at the start: an earlier process may have left some.
                self._writer.close()
                comparison.remove_all(self._registry)
        return self._wanted


class Learner:
    """Everything between the training log and the registry. One thread.

    Args:
        settings: All settings.
        registry: The registry of versions and control; the trainer's lock is held.
        trainer: The weights and the step.
        log: The log with the training log.
        program: SHA-256 of the program that fits the model.
        spec: Digest of the feature spec.
        about: The bootstrap's document of it.
        metrics: The trainer's metrics.
        clock, elapsed: Wall clock in seconds, for times in manifests. Monotonic seconds, for the pace of publishing and
            the retention of recent versions.
        consent: The losses that the operator accepts.
        room: Lets a version wait for disk space; None: a full disk ends the trainer.
        begins: Prepares the trainer if there is no version to continue from.
    """

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        trainer: Trainer,
        log: Log,
        program: str,
        spec: str,
        about: Mapping[str, Any],
        metrics: TrainerMetrics,
        clock: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = time.monotonic,
        consent: Consent = NO_CONSENT,
        room: Room | None = None,
        begins: Begins = from_nothing,
    ) -> None:
        self._settings, self._registry, self._trainer = settings, registry, trainer
        self._kafka, self._spec, self._about, self._begins = log, spec, about, begins
        self._metrics, self._clock, self._elapsed = metrics, clock, elapsed
        drafter = Drafter.of(settings, trainer, spec, program, str(about["salt"]))
        self._passages = Passages(Journal(registry.path / layout.GAPS), consent, metrics, clock)
        times = settings.trainer.publish_s, settings.registry.durable_s, clock, elapsed
        self._publisher = Publisher(registry.path, metrics, settings.registry.recent_s, room, elapsed)
        self._updates = UpdateGuard(
            settings, registry, metrics, clock, elapsed, lambda: shown_of(settings.events.actions, trainer.slices)
        )
        self._publications = Publications(self._publisher, drafter, trainer, metrics, *times, self._updates)
        self._catching_up = CatchingUp(registry, clock, elapsed)
        self._losses = LossRecorder(registry.path)
        self._budget = PrivacyBudget(settings, trainer, metrics, drafter.environment)
        self._log: Reader | None = None
        self.control: Control
        self.place: TrainingPlace
        self._faults: tuple[str, ...] = ()
        self._looked, self.caught_up, self.taken_ms = float("-inf"), False, 0
        self._behind = False

    def enter(self, control: Control) -> None:
        """Becomes the trainer that `control` asks for: the newest version of its epoch, else its base, else from scratch.

        Raises:
            UnknownVersion: The base is not kept.
            CorruptVersion: The base fails its digest.
            UnknownTopic: The training log was recreated since that version.
            GapError: The log does not continue from it: deleted without acceptance, or cut back (TruncatedLog).
        """
        self.control, settings, specs = control, self._settings, former_specs(self._registry.generations.beginnings())
        self._is_former = former(specs, lambda: self._trainer.counters.steps)
        version = control.base if (found := self._registry.newest_good(control.epoch)) is None else found
        if self._log is not None:
            self._log.close()
        first: Mapping[str, Any] | None
        if version is None:
            self._log, self.place, first = self._begins(settings, self._trainer, self._about, self._kafka, control)
        else:
            restored, first = restore_or_carry(self._registry, control, version, self._trainer, self._spec)
            self._log = resume(restored, control.log, self._kafka, settings, self._passages)
            self.place = TrainingPlace.restored(restored, control.epoch, self._log.position(restored.log.partition))
        self._updates.enter(self._trainer.guarded)
        self._budget.enter()
        if first is not None:
            place, topic = self.place, self._reader.topic_id
            self.place = self._publications.publish_first(place, control, self._account(), topic, first)
        self.place, self.caught_up = take_up(self._trainer, self.place, control), False
        self._publications.begin()
        self._catching_up.enter(control, self.place)
        self._updates.look(control, self.place.parent)
        self._let_go()
        where = (control.epoch, self.place.parent, self.place.next)
        logger.info("epoch %d: at version %d, reading the training log from offset %d", *where)

    def tick(self, wait_s: float, stopping: Callable[[], bool] = lambda: False) -> int:
        """Polls control, takes the records of the log, publishes a due version; returns the number of records taken.

        Raises:
            GapError: Records or clicks are gone, and no operator accepted it.
            LogError: The log cannot be read on.
            MicroBatchError, SpecMismatch, SaltMismatch: A record does not fit this stream, and no operator skipped it.
            RegistryError: A version needed cannot be loaded.
        """
        if self._between():
            return 0
        if self._resting:
            time.sleep(min(wait_s, CONTROL_S))
            return 0
        taken, partition, line = 0, self._settings.trainer.partition, self.control.log
        if self._reader.position(partition) != (at := onward(line, self.place.next)):
            self._reader.seek(partition, at)
            self.place = replace(self.place, next=at)
        try:
            batches = self._reader.poll(wait_s, RECORDS)
        except GapError as error:
            at = self._passages.pass_log(error, self.place.marks)
            self._reader.seek(partition, at)
            self.place = replace(self.place, next=at)
            return 0
        for batch in batches:
            for record in records_of(batch):
                if onward(line, record.first) != record.first:
                    self.place = replace(self.place, next=record.first)
                    return taken
                self._take(record)
                taken += 1
                if self._between():
                    return taken
                if stopping() or self._resting:
                    # Records that were polled and not taken are polled again.
                    self._reader.seek(partition, self.place.next)
                    return taken
            self.place = replace(self.place, next=batch.next)
            self.taken_ms = int(batch.timestamps_ms[-1:].max(initial=self.taken_ms))
        self._behind = self._reader.lag().get(partition, 0) > 0
        if not self._behind:
            if not self.caught_up:
                self.caught_up = True
                logger.info("epoch %d: caught up at offset %d", self.place.epoch, self.place.next)
            self._catching_up.look(self.place, self.control, self._publications.busy)
        self._metrics.caught_up.set(self.caught_up)
        self._faults = accounts.show(self._account(), self._metrics, self._faults)
        self._updates.show()
        return taken

    def _account(self) -> dict[str, int]:
        """Outcomes of the rows of the training log, since this branch began."""
        counters = self._trainer.counters
        return self.place.counts() | {"trained": counters.trained, "skipped": counters.skipped}

    def _take(self, record: LogRecord) -> None:
        """Takes one record, as one step if a row is left to learn from."""
        offset, marks, control, salt = record.first, self.place.marks, self.control, str(self._about["salt"])
        self._catching_up.pass_by(offset, self.place)
        source = Source(self._reader.topic_id, self._settings.trainer.partition)
        where = f"{self._settings.kafka.microbatches_topic}:{source.partition} offset {offset}"
        found = take_or_leave(
            record, where, source, marks, self._passages,
            lambda value: take_in(value, marks, control.mask_at, self._spec, salt, where, control.log, offset, self._is_former),
        )  # fmt: skip
        if found is None:
            self.place = self.place.past(record.next)
            return
        at = self._budget.noise_place(found, source, offset, control)
        if not self._budget.allows(at, found, self.place, self._reader.leader_epoch(source.partition, record.next)):
            return
        passed = self._passages.pass_sources(found.gaps, where, source.topic_id)
        before, began_ms, report = self.place, self._trainer.counters.log_ms, None
        self.place = before.taken(found, offset, passed)
        gauges.show_intake(found, self._metrics)
        if len(found.batch):
            report = self._trainer.step(found.batch, place=at)
            self.place = self.place.stepped()
            killpoints.reach("loop.stepped")
            gauges.show_step(report, offset, self._metrics)
            self._losses.take(offset, found.batch.user, report)
        if self._updates.take(found.batch, report, before, self.place, (began_ms, self._trainer.counters.log_ms)):
            self._looked = float("-inf")

    def _let_go(self) -> None:
        """Releases the step guard if control holds nothing: an operator released it, now or before a restart."""
        if self._trainer.guard.held and self.control.held is None and not self._updates.waits:
            logger.info("training goes on after %d skipped steps", self._trainer.guard.skipped)
            self._trainer.guard = self._trainer.guard.released()

    @property
    def _resting(self) -> bool:
        """Whether no record may be taken: guard or operator hold training or an update, or no budget is left."""
        held = self._trainer.guard.held or self._budget.held or bool(self.control.held)
        return held or self._updates.waits or not self.control.training

    def _between(self) -> bool:
        """Runs between two records; returns True if the epoch changed."""
        self._publish_if_due()
        self._looked = float("-inf") if self._updates.write() else self._looked
        return self._look_at_control()

    def _look_at_control(self) -> bool:
        """Converges to the newest control, polled a few times a second; returns True if the epoch changed."""
        if self._elapsed() - self._looked < CONTROL_S:
            return False
        self._looked = self._elapsed()
        control = self._registry.control()
        if control is None:
            return False
        if control == self.control:
            self._let_go()
            return False
        logger.info("control %d: %s by %s (%s)", control.generation, control.action, control.actor, control.reason)
        return self._converge(control)

    def _converge(self, control: Control) -> bool:
        """Applies a new generation; returns True if that is another epoch."""
        if control.epoch != self.place.epoch:
            try:
                self._settle(wait=True)
            except WrongEpoch as refused:
                logger.info("%s", refused)
            self.enter(control)
            return True
        self.control, self.place = control, take_up(self._trainer, self.place, control)
        self._updates.look(control, self.place.parent)
        self._let_go()
        return False

    # Publishing

    def _publish_if_due(self) -> None:
        try:
            self._settle()
            if self._publications.due(self.place, self.control, self._late_s):
                self.publish()
        except WrongEpoch as refused:
            logger.info("%s", refused)
            self._looked = float("-inf")

    @property
    def _late_s(self) -> float:
        """How long the last records that were taken had waited in the log, if others waited at the last poll."""
        return max(0.0, self._clock() - self.taken_ms / 1000) if self._behind else 0.0

    def publish(self, last: bool = False) -> None:
        """Hands the changes to the publisher; the copy is made here, in the step thread. The `last` one is durable."""
        leader = self._reader.leader_epoch(self._settings.trainer.partition, self.place.next)
        place, topic_id = replace(self.place, leader_epoch=leader), self._reader.topic_id
        self.place = self._publications.publish(place, self.control, self._account(), topic_id, last)

    def _settle(self, wait: bool = False) -> None:
        if (made := self._publications.settle(wait)) is not None:
            self.place = self.place.at_version(made)

    def close(self) -> None:
        """Publishes the rest durably, and ends; the next start continues from here, or from before a held update.

        Raises:
            OSError: The disk refused.
        """
        try:
            self._settle(wait=True)
            if self.place.unsaved and self.control.publishing and self._updates.passes:
                self.publish(last=True)
                self._settle(wait=True)
        except WrongEpoch as refused:
            logger.info("%s", refused)
        finally:
            self._publisher.close()
            self._reader.close()

    @property
    def _reader(self) -> Reader:
        assert self._log is not None, "enter an epoch first"
        return self._log
