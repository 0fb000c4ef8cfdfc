"""Takes records of the training log, steps, publishes, and converges to control: the only writer of weights.

The weights are a function of (base, log range, mask). Whatever happens in between, a restart or a rollback, comes down
to one thing: load a version and read on from its place in the log.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from state import layout
from state.config.settings import Settings
from state.errors import GapError, WrongEpoch
from state.log import LogReader
from state.log.accepted_gaps import Journal
from state.log.gaps import Consent
from state.metrics import TrainerMetrics
from state.positions import Source
from state.process import killpoints
from state.registry.control import Control
from state.registry.log_line import onward
from state.registry.registry import Registry
from state.registry.upgrades import former_specs
from state.storage.waiting import Room
from trainer import accounts, gauges
from trainer.accounts import Passages
from trainer.beginning import Begins, from_nothing
from trainer.catching_up import CatchingUp
from trainer.engine.step import Trainer
from trainer.forgetting import take_up
from trainer.holding import UpdateGuard
from trainer.intake import former, take_in
from trainer.loss_recording import LossRecorder
from trainer.measures.breakdown import shown_of
from trainer.place import TrainingPlace
from trainer.privacy_budget import PrivacyBudget
from trainer.publications import Publications
from trainer.records import LogRecord, records_of, take_or_leave
from trainer.resume import OpenLog, resume
from trainer.versions.draft import Drafter
from trainer.versions.first_version import restore_or_carry
from trainer.versions.publisher import Publisher

CONTROL_S, RECORDS = 0.05, 32
NO_CONSENT = Consent()
logger = logging.getLogger(__name__)


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
        clock, elapsed: Wall clock in seconds, for times in manifests; monotonic seconds, for the pace of publishing and how long recent versions stay.
        consent: The losses that the operator accepts.
        room: Where a version waits for room on the disk; None: one that has none ends the trainer.
        begins: What it learns where there is no version to go on from.
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
        room: Room | None = None,
        begins: Begins = from_nothing,
    ) -> None:
        self._settings, self._registry, self._trainer = settings, registry, trainer
        self._open_log, self._spec, self._about, self._begins = open_log, spec, about, begins
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
        self._log: LogReader | None = None
        self.control: Control
        self.place: TrainingPlace
        self._faults: tuple[str, ...] = ()
        self._looked, self.caught_up, self.taken_ms = float("-inf"), False, 0

    def enter(self, control: Control) -> None:
        """Becomes the trainer that `control` wants: the newest version of its epoch, else its base, else nothing.

        Raises:
            UnknownVersion: The base is not kept.
            CorruptVersion: The base fails its digest.
            UnknownTopic: The training log was made anew since that version.
            GapError: The log does not lead on from it: deleted, and nobody accepted it, or cut back (TruncatedLog).
        """
        self.control, settings, specs = control, self._settings, former_specs(self._registry.beginnings())
        self._is_former = former(specs, lambda: self._trainer.counters.steps)
        version = control.base if (found := self._registry.newest_good(control.epoch)) is None else found
        if self._log is not None:
            self._log.close()
        first: Mapping[str, Any] | None
        if version is None:
            self._log, self.place, first = self._begins(settings, self._trainer, self._about, self._open_log, control)
        else:
            restored, first = restore_or_carry(self._registry, control, version, self._trainer, self._spec)
            self._log, at = resume(restored, control.log, self._open_log, self._passages)
            self.place = TrainingPlace.restored(restored, control.epoch, at)
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
        """Looks at control, takes what the log has, publishes what is due; returns the records taken.

        Raises:
            GapError: Records or clicks are gone, and nobody accepted it.
            LogError: The log cannot be read on.
            MicroBatchError, SpecMismatch, SaltMismatch: A record is not what this stream writes, and nobody left it out.
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
            self._reader.close()
            self._log, self.place = self._open_log(at), replace(self.place, next=at)
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
                    # What was polled and not taken is polled again.
                    self._reader.seek(partition, self.place.next)
                    return taken
            self.place = replace(self.place, next=batch.next)
            self.taken_ms = int(batch.timestamps_ms[-1:].max(initial=self.taken_ms))
        if self._reader.lag().get(partition, 0) == 0:
            if not self.caught_up:
                self.caught_up = True
                logger.info("epoch %d: caught up at offset %d", self.place.epoch, self.place.next)
            self._catching_up.look(self.place, self.control, self._publications.busy)
        self._metrics.caught_up.set(self.caught_up)
        self._faults = accounts.show(self._account(), self._metrics, self._faults)
        self._updates.show()
        return taken

    def _account(self) -> dict[str, int]:
        """What became of the rows of the training log, since this line began."""
        counters = self._trainer.counters
        return self.place.counts() | {"trained": counters.trained, "skipped": counters.skipped}

    def _take(self, record: LogRecord) -> None:
        """One record is one step, where a row is left to learn from."""
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
        """Lets the guard of steps go on where control holds nothing: an operator released it, now or before a restart."""
        if self._trainer.guard.held and self.control.held is None and not self._updates.waits:
            logger.info("training goes on after %d skipped steps", self._trainer.guard.skipped)
            self._trainer.guard = self._trainer.guard.released()

    @property
    def _resting(self) -> bool:
        """Whether no record is to be taken: guard or operator hold training or what was learned, or no budget is left."""
        held = self._trainer.guard.held or self._budget.held or bool(self.control.held)
        return held or self._updates.waits or not self.control.training

    def _between(self) -> bool:
        """Between two records; True where the epoch changed."""
        self._publish_if_due()
        self._looked = float("-inf") if self._updates.write() else self._looked
        return self._look_at_control()

    def _look_at_control(self) -> bool:
        """Converges to the newest control, looked at a few times a second; True where the epoch changed."""
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
        """Becomes what a new generation wants; True where that is another epoch."""
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
            if self._publications.due(self.place, self.control):
                self.publish()
        except WrongEpoch as refused:
            logger.info("%s", refused)
            self._looked = float("-inf")

    def publish(self, last: bool = False) -> None:
        """Hands what changed to the publisher; the copy is made here, in the step thread. The `last` one is durable."""
        leader = self._reader.leader_epoch(self._settings.trainer.partition, self.place.next)
        place, topic_id = replace(self.place, leader_epoch=leader), self._reader.topic_id
        self.place = self._publications.publish(place, self.control, self._account(), topic_id, last)

    def _settle(self, wait: bool = False) -> None:
        if (made := self._publications.settle(wait)) is not None:
            self.place = self.place.at_version(made)

    def close(self) -> None:
        """Publishes what is left, durably, and ends; the next start goes on from here, or from before what is held.

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
    def _reader(self) -> LogReader:
        assert self._log is not None, "enter an epoch first"
        return self._log
