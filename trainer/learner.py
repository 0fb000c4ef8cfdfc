"""Takes records of the training log, steps, publishes, and does what control demands: the only writer of weights.

The weights are a function of (base, log range, mask). A restart or a rollback therefore comes down to one operation:
load a version and read on from its position in the log.
"""

from __future__ import annotations

import getpass
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from state import layout
from state.config.settings import Settings
from state.errors import ControlConflict, GapError, UnusableRegistry, WrongEpoch
from state.experiments import comparison
from state.experiments.comparison import LossWriter, RowLosses
from state.log import Log, Reader
from state.log.accepted_gaps import Consent, Journal
from state.log.topic_plan import TRAINING_PARTITION
from state.metrics import TrainerMetrics
from state.positions import Gap, Source
from state.process import killpoints
from state.process.environment import CLOCKS, Clocks
from state.process.log_lines import SaidOnce
from state.registry.control import Control, follow
from state.registry.log_line import onward
from state.registry.model_fit import former_specs
from state.registry.registry import RECENT_S, Registry
from state.registry.segments import ClickRanges, clicks_in, from_json, has_caught_up, learned_before
from state.storage import Room, is_full, unless_full
from trainer import gauges
from trainer.beginning import Begins, from_nothing, resume
from trainer.engine.guard import Verdict
from trainer.engine.report import Report
from trainer.engine.step import Trainer
from trainer.holding import UpdateGuard
from trainer.intake import BAD, LogRecord, Passages, RecordFilter, TrainingPlace, former, records_of, show_account
from trainer.measures.progressive import SUMS
from trainer.privacy_budget import PrivacyBudget
from trainer.publications import Publications, ServedModel
from trainer.versions import checkpoint
from trainer.versions.carrying import restore_or_carry
from trainer.versions.publisher import Publisher

RETRY_S = 5.0
"""Seconds between two attempts to let serving follow while the object store of a shared registry is unreachable."""
REMEMBERED = 32
"""The most erasures of an epoch that a version records with their offsets."""
READER_POLL_S, LOSSES_RETRY_S = 1.0, 10.0
"""Seconds between two checks for a reader of row losses, and after a failed write of them."""
CONTROL_S = 0.05
"""Seconds between two polls of control."""
IDLE_TICKS = 20
"""Of so many polls without a record, one shows the account and the guard: once a second (`trainer/loop.py`, `WAIT_S`)."""
RECORDS = 32
"""The most records of one poll."""
NO_CONSENT = Consent()
_LOG_LOSS = SUMS.index("log_loss")
logger = logging.getLogger(__name__)


class CatchingUp:
    """Follows one epoch from its start until the trainer has caught up. The step thread calls every method."""

    def __init__(self, registry: Registry, clocks: Clocks) -> None:
        self._registry, self._clocks = registry, clocks
        self._refused_s = float("-inf")
        self._began: Control | None = None
        self._goal: dict[Source, int] = {}
        self._planned: ClickRanges = {}
        self._again: dict[str, int] | None = None
        self._watched = self._caught_up = False
        self._end = 0
        self._warn_once = SaidOnce(logger.warning)

    def enter(self, control: Control, position: TrainingPlace) -> None:
        """Enters an epoch. An epoch whose outcome is written already is not followed again, nor is an upgrade."""
        self._caught_up, self._again = False, None
        self._watched = not has_caught_up(self._registry, control.epoch) or control.serving.then_follow
        self._began = self._registry.generations.beginning_of(control.epoch) if self._watched else None
        self._goal = learned_before(self._registry, control.epoch) if self._watched else {}
        plan = {} if self._began is None or self._began.plan is None else self._began.plan
        self._planned = from_json(plan.get("again", {}))
        is_at_base = self._began is not None and position.parent == self._began.base
        if self._watched and not is_at_base and self._is_past_plan(position, position.next):
            # The trainer cannot distinguish records that it read before this start from later ones.
            self._again = {}

    def pass_by(self, offset: int, position: TrainingPlace) -> None:
        """Runs before the record at `offset`. Counts the relearned rows up to where the log ended at planning time."""
        if self._watched and self._again is None and self._is_past_plan(position, offset):
            self._again = self._since_base(position)

    def check(self, position: TrainingPlace, control: Control, busy: bool) -> None:
        """Runs between two records, after the end of the log was reached. A failed write is retried at a later call.

        1. Once training has reached the positions before the rollback, write the outcome.
        2. Once all of them are published (`busy` is false), let serving follow if the rollback asked for it.
        """
        if not self._watched:
            return
        self.pass_by(position.next, position)
        # 1.
        if not self._caught_up:
            if any(position.marks.get(source, 0) < mark for source, mark in self._goal.items()):
                return
            with unless_full(self._warn_once):
                self._write(position)
                self._caught_up, self._end = True, position.next
            if not self._caught_up:
                return
            killpoints.reach("caught.written")
        # 2.
        if not control.serving.then_follow:
            self._watched = False
        elif self._clocks.elapsed() - self._refused_s < RETRY_S:
            return
        elif not busy and (position.first >= self._end or not position.changed):
            with unless_full(self._warn_once):
                self._watched = not self._let_follow(control)

    def _is_past_plan(self, position: TrainingPlace, offset: int) -> bool:
        """Whether `offset` is past all that the plan counted.

        The plan of an exact rollback counts clicks, because the stream writes new records of them.
        """
        if self._began is None or self._began.plan is None or self._began.action != "rollback":
            return False
        if self._began.mode == "exact":
            return "again" in self._began.plan and all(
                position.marks.get(source, 0) >= after for source, (_, after) in self._planned.items()
            )
        return offset >= int(self._began.plan["end"])

    def _since_base(self, position: TrainingPlace) -> dict[str, int]:
        began = self._began
        before = {} if began is None or began.base is None else self._registry.manifest(began.base).metrics
        counts = position.counts()
        names = ("rows", "duplicate", "masked", "gap")
        learned = {name: counts[name] - int(before.get(f"account.{name}", 0)) for name in names}
        rows = {"rows": learned["rows"] - learned["duplicate"], "masked": learned["masked"]}
        if began is None or began.mode != "exact":
            return rows
        relearned = {
            source: (first, min(after, position.marks.get(source, first)))
            for source, (first, after) in self._planned.items()
        }
        return {**rows, "clicks": clicks_in(relearned) - learned["gap"]}

    def _write(self, position: TrainingPlace) -> None:
        if self._began is None or self._began.base is None:
            return
        now_ms = int(self._clocks.wall() * 1000)
        document: dict[str, Any] = {
            "at_ms": now_ms,
            "seconds": max(0, now_ms - self._began.created_at_ms) / 1000,
            "next": position.next,
            **self._since_base(position),
            "again": self._again or None,
        }
        if self._registry.generations.add_outcome(position.epoch, "learned", document):
            logger.info(
                "epoch %d: caught up %.1f s after the rollback: %d rows, of which %d were left out",
                *(position.epoch, document["seconds"], document["rows"], document["masked"]),
            )

    def _let_follow(self, control: Control) -> bool:
        action = "rollback" if self._began is None else self._began.action

        def caught_up(newest: Control) -> Control:
            if newest.epoch != control.epoch or not newest.serving.then_follow:
                return newest
            who, now_ms = f"trainer:{getpass.getuser()}", int(self._clocks.wall() * 1000)
            return follow(newest, actor=who, reason=f"caught up, as the {action} asked", now_ms=now_ms)

        try:
            self._registry.change(caught_up)
            killpoints.reach("caught.followed")
            return True
        except ControlConflict as refused:
            # Another process keeps changing control: try again after the next record.
            logger.info("%s", refused)
            return False
        except UnusableRegistry as error:
            if is_full(error):
                raise
            self._refused_s = self._clocks.elapsed()
            self._warn_once(f"{error}; serving follows once control can be written")
            return False


class LossRecorder:
    """Writes the loss of each row, as it was scored before it was learned, for comparison with another trainer.

    Without a reader it neither writes nor copies anything (`state/experiments/comparison.py`).
    """

    def __init__(self, registry: Path, elapsed: Callable[[], float] = time.monotonic) -> None:
        self._registry, self._elapsed = registry, elapsed
        self._next_poll_s, self._writer = float("-inf"), LossWriter(registry)
        self._wanted = True
        self._warn_once = SaidOnce(logger.warning)

    def take(self, offset: int, users: npt.NDArray[np.uint64], report: Report) -> None:
        """Writes the losses of an accepted step if there is a reader. After a disk error, logs it and pauses writing.

        A record with rows that the guard skipped is left out, because a comparison needs rows that both trainers learn.
        """
        if not self._has_reader() or report.verdict is not Verdict.ACCEPT:
            return
        targets = np.concatenate([judgement.targets for judgement in report.judged])
        losses = np.concatenate([judgement.rows[:, _LOG_LOSS] for judgement in report.judged])
        try:
            self._writer.append(RowLosses(offset, comparison.blocks_of(users[targets]), losses))
        except OSError as error:
            self._warn_once(f"losses of rows are not written, and no experiment is compared meanwhile: {error}")
            self._wanted, self._next_poll_s = False, self._elapsed() + LOSSES_RETRY_S

    def _has_reader(self) -> bool:
        now_s = self._elapsed()
        if now_s >= self._next_poll_s:
            before, self._wanted = self._wanted, comparison.is_wanted(self._registry)
            self._next_poll_s = now_s + READER_POLL_S
            if before and not self._wanted:
                # This also happens at the start, because an earlier process may have left files.
                self._writer.close()
                comparison.remove_all(self._registry)
        return self._wanted


def erased_up_to(control: Control, trainer: Trainer, position: TrainingPlace) -> TrainingPlace:
    """Forgets the users of control's new erasures. Returns the new place, marked as changed so that a version records it.

    From the place's offset on, the mask excludes these users' rows of the training log. A version records its erasures
    with their offsets, so that a replay applies them at the same offsets.
    """
    new = control.erased.after(position.erased)
    if not new:
        return position
    rows = trainer.forget(new.users.ids)
    logger.info(
        "erasure %d: %d users are forgotten, %d rows of theirs at offset %d",
        new.last,
        len(new.users),
        rows,
        position.next,
    )
    erasures = (*position.erasures, (new.last, position.next))[-REMEMBERED:]
    return replace(position, erased=new.last, erasures=erasures).stepped()


@dataclass(frozen=True)
class Surroundings:
    """The environment of a learner: how it starts, its limits and its clocks.

    Attributes:
        room: Lets a version wait for disk space; None: a full disk ends the trainer.
        begins: Prepares the trainer if there is no version to continue from.
        recent_s: How long a version that is not durable is kept.
    """

    consent: Consent = NO_CONSENT
    room: Room | None = None
    begins: Begins = from_nothing
    recent_s: float = RECENT_S
    clocks: Clocks = CLOCKS


class Learner:
    """Learns the records of the training log and publishes versions to the registry. One thread."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        trainer: Trainer,
        log: Log,
        model: ServedModel,
        metrics: TrainerMetrics,
        surroundings: Surroundings = Surroundings(),
    ) -> None:
        clocks = surroundings.clocks
        self._settings, self._registry, self._trainer = settings, registry, trainer
        self._kafka, self._spec, self._description, self._begins = log, model.spec, model.about, surroundings.begins
        self._partition = TRAINING_PARTITION
        self._metrics, self._clocks = metrics, clocks
        self._passages = Passages(
            Journal(registry.path / layout.GAPS, registry.directory.staging), surroundings.consent, metrics, clocks.wall
        )
        self._publisher = Publisher(registry, metrics, surroundings.recent_s, surroundings.room, clocks.elapsed)
        self._updates = UpdateGuard(settings, registry, metrics, clocks, lambda: trainer.measures.shown())
        self._publications = Publications(settings, self._publisher, model, trainer, metrics, self._updates, clocks)
        self._catching_up = CatchingUp(registry, clocks)
        self._losses = LossRecorder(registry.path)
        self._budget = PrivacyBudget(settings, registry.directory, trainer, metrics, model.environment)
        self._log: Reader | None = None
        self.control: Control
        self.place: TrainingPlace
        self._faults: tuple[str, ...] = ()
        self._polled_s, self.caught_up, self.taken_ms = float("-inf"), False, 0
        self._behind, self._steps_s, self._idle_ticks = False, 0.0, 0

    def enter(self, control: Control) -> None:
        """Restores what `control` requires: the newest version of its epoch, else its base, else an untrained state.

        Raises:
            UnknownVersion: The base is not kept.
            CorruptVersion: The base fails its digest.
            UnknownTopic: The training log was recreated since that version.
            GapError: The log does not continue from it: deleted without acceptance, or truncated (TruncatedLog).
        """
        self.control, settings, specs = control, self._settings, former_specs(self._registry.generations.beginnings())
        is_former = former(specs, lambda: self._trainer.counters.steps)
        self._filter = RecordFilter(self._spec, str(self._description["salt"]), is_former)
        version = control.base if (newest := self._registry.newest_good(control.epoch)) is None else newest
        if self._log is not None:
            self._log.close()
        first: Mapping[str, Any] | None
        if version is None:
            self._log, self.place, first = self._begins(
                settings, self._trainer, self._description, self._kafka, control
            )
        else:
            restored, first = restore_or_carry(self._registry, control, version, self._trainer, self._spec)
            self._log = resume(restored, control.log, self._kafka, settings, self._passages)
            self.place = TrainingPlace.restored(restored, control.epoch, self._log.position(restored.log.partition))
        self._updates.enter(self._trainer.guarded)
        self._budget.enter()
        if first is not None:
            position, topic = self.place, self._reader.topic_id
            self.place = self._publications.publish_first(position, control, self._account(), topic, first)
        self._trainer.rejoin(self._load, self.place.parent)
        self.place, self.caught_up = erased_up_to(control, self._trainer, self.place), False
        self._publications.begin()
        self._catching_up.enter(control, self.place)
        self._updates.follow(control, self.place.parent)
        self._release_guard()
        where = (control.epoch, self.place.parent, self.place.next)
        logger.info("epoch %d: at version %d, reading the training log from offset %d", *where)

    def _load(self, trainer: Trainer, version: int) -> None:
        checkpoint.restore(self._registry, version, trainer, self._spec)

    def tick(self, wait_s: float, stopping: Callable[[], bool] = lambda: False) -> int:
        """Publishes a due version, polls control, and takes records of the log; returns the number of records taken.

        Raises:
            GapError: Records or clicks are missing, and no operator accepted the loss.
            LogError: The log cannot be read.
            MicroBatchError, SpecMismatch, SaltMismatch: A record does not fit this stream, and no operator skipped it.
            RegistryError: A version needed cannot be loaded.
            WorkerLost: Another worker of the trainer ended or does not answer.
        """
        self._trainer.beat()
        if self._publish_and_poll():
            return 0
        if self._resting:
            time.sleep(min(wait_s, CONTROL_S))
            return 0
        count, partition, branch = 0, self._partition, self.control.log
        if self._reader.position(partition) != (at := onward(branch, self.place.next)):
            self._reader.seek(partition, at)
            self.place = replace(self.place, next=at)
        try:
            batches = self._reader.poll(min(wait_s, self._due_in_s()), RECORDS)
        except GapError as error:
            at = self._passages.pass_log(error, self.place.marks)
            self._reader.seek(partition, at)
            self.place = replace(self.place, next=at)
            return 0
        for batch in batches:
            for record in records_of(batch):
                if onward(branch, record.first) != record.first:
                    self.place = replace(self.place, next=record.first)
                    return count
                self._take(record)
                count += 1
                if self._publish_and_poll(has_stepped=True):
                    return count
                if stopping() or self._resting:
                    # Records that were polled and not taken are polled again.
                    self._reader.seek(partition, self.place.next)
                    return count
            self.place = replace(self.place, next=batch.next)
            self.taken_ms = int(batch.timestamps_ms[-1:].max(initial=self.taken_ms))
        self._behind = self._reader.lag().get(partition, 0) > 0
        if not self._behind:
            if not self.caught_up:
                self.caught_up = True
                logger.info("epoch %d: caught up at offset %d", self.place.epoch, self.place.next)
            self._catching_up.check(self.place, self.control, self._publications.busy)
        self._metrics.caught_up.set(self.caught_up)
        self._idle_ticks = 0 if count else self._idle_ticks + 1
        if self._idle_ticks < 2 or self._idle_ticks % IDLE_TICKS == 0:
            self._faults = show_account(self._account(), self._metrics, self._faults)
            self._updates.show()
        return count

    def _account(self) -> dict[str, int]:
        counters = self._trainer.counters
        return self.place.counts() | {"trained": counters.trained, "skipped": counters.skipped}

    def _take(self, record: LogRecord) -> None:
        offset, marks, control = record.first, self.place.marks, self.control
        self._catching_up.pass_by(offset, self.place)
        source = Source(self._reader.topic_id, self._partition)
        if self._passages.is_left_out(source, offset):
            self.place = self.place.past(record.next)
            return
        where = f"{self._settings.kafka.microbatches_topic}:{source.partition} offset {offset}"
        try:
            record.require_whole(where)
            intake = self._filter.take_in(record.value, marks, control.mask_at, where, control.log, offset)
        except BAD as problem:
            self._passages.leave_out(Gap(source, offset, record.next), marks, problem)
            self.place = self.place.past(record.next)
            return
        noise_place = self._budget.noise_place(intake, source, offset, control)
        if not self._budget.allows(
            noise_place, intake, self.place, self._reader.leader_epoch(source.partition, record.next)
        ):
            return
        passed = self._passages.pass_sources(intake.gaps, where, source.topic_id)
        before, began_ms, report = self.place, self._trainer.counters.log_ms, None
        self.place = before.taken(intake, offset, passed)
        gauges.show_intake(intake, self._metrics)
        if len(intake.batch):
            report = self._trainer.step(intake.batch, place=noise_place)
            self._steps_s += report.seconds
            self.place = self.place.stepped()
            killpoints.reach("loop.stepped")
            gauges.show_step(report, offset, self._metrics)
            gauges.show_workers(self._trainer.loads, self._metrics)
            self._losses.take(offset, intake.batch.user, report)
        if self._updates.take(intake.batch, report, before, self.place, (began_ms, self._trainer.counters.log_ms)):
            self._polled_s = float("-inf")

    def _release_guard(self) -> None:
        """Releases the step guard if control holds nothing: an operator released it, now or before a restart."""
        if self._trainer.guard.held and self.control.held is None and not self._updates.waits:
            logger.info("training continues after %d skipped steps", self._trainer.guard.skipped)
            self._trainer.guard = self._trainer.guard.released()

    @property
    def _resting(self) -> bool:
        is_held = self._trainer.guard.held or self._budget.held or bool(self.control.held)
        return is_held or self._updates.waits or not self.control.training

    def _publish_and_poll(self, has_stepped: bool = False) -> bool:
        """Publishes a due version and polls control; returns whether another epoch was entered."""
        self._publish_if_due(has_stepped)
        self._polled_s = float("-inf") if self._updates.write() else self._polled_s
        return self._poll_control()

    def _poll_control(self) -> bool:
        if self._clocks.elapsed() - self._polled_s < CONTROL_S:
            return False
        self._polled_s = self._clocks.elapsed()
        control = self._registry.control()
        if control is None:
            return False
        if control == self.control:
            self._release_guard()
            return False
        logger.info("control %d: %s by %s (%s)", control.generation, control.action, control.actor, control.reason)
        return self._converge(control)

    def _converge(self, control: Control) -> bool:
        if control.epoch != self.place.epoch:
            try:
                self._settle(wait=True)
            except WrongEpoch as refused:
                logger.info("%s", refused)
            self.enter(control)
            return True
        self.control, self.place = control, erased_up_to(control, self._trainer, self.place)
        self._updates.follow(control, self.place.parent)
        self._release_guard()
        return False

    # Publishing

    def _publish_if_due(self, has_stepped: bool) -> None:
        try:
            self._settle()
            if self._due_in_s(has_stepped) == 0.0:
                self.publish()
        except WrongEpoch as refused:
            logger.info("%s", refused)
            self._polled_s = float("-inf")

    def _due_in_s(self, has_stepped: bool = False) -> float:
        """Seconds until a version is due; see `Publications`."""
        return self._publications.due_in_s(self.place, self.control, self._late_s, self._steps_s, has_stepped)

    @property
    def _late_s(self) -> float:
        """How long the last records that were taken had waited in the log, if others waited at the last poll."""
        return max(0.0, self._clocks.wall() - self.taken_ms / 1000) if self._behind else 0.0

    def publish(self, last: bool = False) -> None:
        """Hands the changes to the publisher; the copy is made here, in the step thread. The `last` one is durable."""
        leader = self._reader.leader_epoch(self._partition, self.place.next)
        position, topic_id = replace(self.place, leader_epoch=leader), self._reader.topic_id
        self.place = self._publications.publish(position, self.control, self._account(), topic_id, last)
        self._steps_s = 0.0

    def _settle(self, wait: bool = False) -> None:
        for written in self._publications.settle(wait):
            self.place = self.place.at_version(written)

    def close(self) -> None:
        """Publishes the rest durably, and ends; the next start continues from here, or from before a held update.

        Raises:
            OSError: The disk cannot be written.
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
            self._trainer.stop()

    @property
    def _reader(self) -> Reader:
        assert self._log is not None, "enter an epoch first"
        return self._log
