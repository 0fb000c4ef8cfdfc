"""Decides when the learner's work becomes a version, recent or durable, and copies its data in the step thread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from state import probe
from state.config.settings import Settings
from state.log.topic_plan import TRAINING_PARTITION
from state.metrics import TrainerMetrics
from state.process.environment import Clocks
from state.registry.control import Control
from state.registry.log_line import epoch_at, onward
from state.registry.manifest import TOLD_MS, Draft, Kind, LogRange, Manifest
from state.registry.registry import MOST_BETWEEN
from trainer import gauges
from trainer.engine.step import Trainer
from trainer.holding import UpdateGuard
from trainer.intake import TrainingPlace
from trainer.measures import slices as sliced
from trainer.measures.slices import SliceMeasures
from trainer.model.model import F32, Model
from trainer.versions import checkpoint
from trainer.versions.content import Array
from trainer.versions.publisher import Publisher, Saving

LOAD_PACES, LATE_PACES = 10, 40
"""The most times `trainer.publish_s` between two versions: under load, and while learning is late."""

LATE_SHARE = 0.5
"""Seconds between two versions for each second that learning is late."""

MOST_SLACK = 0.5
"""The most intervals by which a version is early, or brings the next one forward."""

WRITING_S = 0.02
"""Seconds between two checks whether the previous version is written."""

FULL_S = 1.0
"""Least seconds between recent versions that carry a probe and changed item lists. Both cost the trainer and each host
several ms, and most lists that change in one version change in the next one too. Their measures are also shown as
metrics, of which a scrape reads the newest ones only."""


def interval_s(publish_s: float, late_s: float, steps_s: float) -> float:
    """Seconds between two versions: `publish_s` besides the time of steps. Each one costs the trainer and every host time.

    Args:
        publish_s: The setting.
        late_s: How long the newest learned records waited in the log, if others still wait.
        steps_s: Seconds of steps since the last version.

    >>> [round(interval_s(0.05, late_s, steps_s=0.01), 2) for late_s in (0.0, 0.3, 2.0, 6.0, 3600.0)]
    [0.06, 0.15, 1.0, 2.0, 2.0]
    >>> interval_s(0.05, late_s=0.0, steps_s=3.0)
    0.5
    """
    return max(min(publish_s + steps_s, LOAD_PACES * publish_s), min(LATE_SHARE * late_s, LATE_PACES * publish_s))


class Pace:
    """Decides when the next version is due; `interval_s` tells how far apart versions are on average.

    Records come at intervals of their own, and answers are newest if a version follows right after its record. So a
    version right after a record may be early, and the next one is then later. A late version brings the next one
    forward. Both by at most `MOST_SLACK` intervals.

    Args:
        publish_s: The setting.
        now_s: When the epoch begins; the first version is due an interval later.

    >>> pace = Pace(0.1, now_s=0.0)
    >>> [round(pace.due_in_s(now_s), 2) for now_s in (0.09, 0.14)]
    [0.01, 0.0]
    >>> pace.published(0.14); [round(pace.due_in_s(now_s), 2) for now_s in (0.19, 0.2)]
    [0.01, 0.0]
    >>> pace.published(0.2); [round(pace.due_in_s(0.26, has_stepped=after), 2) for after in (False, True)]
    [0.04, 0.0]
    """

    def __init__(self, publish_s: float, now_s: float) -> None:
        self._publish_s, self._counted_s, self._interval_s = publish_s, now_s, publish_s

    def due_in_s(self, now_s: float, late_s: float = 0.0, steps_s: float = 0.0, has_stepped: bool = False) -> float:
        """Seconds until a version is due, at least 0.

        Learning is late by `late_s`; steps took `steps_s` since the last version, and `has_stepped` if one just ended.
        """
        self._interval_s = interval_s(self._publish_s, late_s, steps_s)
        early_s = MOST_SLACK * self._interval_s if has_stepped else 0.0
        return max(0.0, self._counted_s + self._interval_s - early_s - now_s)

    def published(self, now_s: float) -> None:
        """Records a version of `now_s`."""
        self._counted_s = max(self._counted_s + self._interval_s, now_s - MOST_SLACK * self._interval_s)


class ProbedRanker:
    """Answers a version's probe with the current weights; serving compares its answers with these (`state/probe.py`).

    Only the step thread may call it.

    Args:
        model: The ranker.
        predict: Its outputs with the current weights: of the engine that learns them, not of serving's program.
    """

    def __init__(self, model: Model, predict: Callable[[Mapping[str, F32]], Mapping[str, Any]]) -> None:
        self._inputs, self._predict = probe.inputs(model.shapes()), predict

    def answers(self) -> dict[str, Array]:
        """The tensors `probe.<output>` of a version with these weights."""
        return {f"{probe.PREFIX}{name}": np.array(value) for name, value in self._predict(self._inputs).items()}


class ServedModel(NamedTuple):
    """What all versions of a trainer have in common.

    Attributes:
        program: SHA-256 of the program that fits the model.
        spec: Digest of the feature spec.
        about: The bootstrap's document of it.
        environment: What the bits of a step depend on besides the log.
    """

    program: str
    spec: str
    about: Mapping[str, Any]
    environment: Mapping[str, str]


class Publications:
    """The learner's versions. The step thread calls every method."""

    def __init__(
        self,
        settings: Settings,
        publisher: Publisher,
        model: ServedModel,
        trainer: Trainer,
        metrics: TrainerMetrics,
        updates: UpdateGuard,
        clocks: Clocks,
    ) -> None:
        self._updates = updates
        self._publisher, self._model, self._trainer = publisher, model, trainer
        self._topic = settings.kafka.microbatches_topic
        self._metrics, self._publish_s, self._clocks = metrics, settings.trainer.publish_s, clocks
        self._durable_s, self._probed = settings.registry.durable_s, ProbedRanker(trainer.model, trainer.engine.predict)
        self._pace = Pace(self._publish_s, clocks.elapsed())
        self._saved_s = self._full_s = float("-inf")

    def _durable_is_due(self, position: TrainingPlace) -> bool:
        is_last_recent = position.parent - position.durable >= MOST_BETWEEN - 1
        return is_last_recent or self._clocks.elapsed() - self._saved_s >= self._durable_s

    @property
    def busy(self) -> bool:
        """Whether a version is being written, recent or durable, or was not settled yet."""
        return self._publisher.busy

    def begin(self) -> None:
        """Begins an epoch, or continues after a start: the first version is due a pace later, and durable."""
        self._pace, self._saved_s = Pace(self._publish_s, self._clocks.elapsed()), float("-inf")

    def due_in_s(
        self, position: TrainingPlace, control: Control, late_s: float, steps_s: float, has_stepped: bool
    ) -> float:
        """Seconds until a version, or a durable one, is due; infinity if there is nothing to publish, or it may not.

        See `Pace` for the last arguments. While the previous version is written, returns the time until the next check.
        """
        is_durable = self._durable_is_due(position)
        if not (position.changed or (position.unsaved and is_durable)):
            return math.inf
        if not control.publishing:
            return math.inf
        if not self._updates.passes:
            return self._updates.passes_in_s
        if not self._publisher.accepts or (is_durable and self._publisher.saves):
            return WRITING_S
        return self._pace.due_in_s(self._clocks.elapsed(), late_s, steps_s, has_stepped)

    def settle(self, wait: bool = False) -> list[Manifest]:
        """The versions that have been written since the last call; see `Publisher.settle`.

        Raises:
            WrongEpoch: One was refused, because control is at another epoch.
            OSError: The disk cannot be written.
        """
        written = self._publisher.settle(wait)
        for version in written:
            # Once a version is durable, there may be newer ones.
            if not version.durable:
                self._metrics.version.set(version.version)
        return written

    def publish(
        self, position: TrainingPlace, control: Control, account: Mapping[str, int], topic_id: str, last: bool = False
    ) -> TrainingPlace:
        """Hands a copy of the changes to the publisher; returns the position afterwards. The `last` version is durable."""
        began = time.perf_counter()
        # A durable version may become due after `due_in_s`, while another one is written.
        durable = last or (self._durable_is_due(position) and not self._publisher.saves)
        probe, is_full = {}, durable or self._clocks.elapsed() - self._full_s >= FULL_S
        if is_full:
            probe, self._full_s = self._probed.answers(), self._clocks.elapsed()
        served = checkpoint.served(self._trainer, is_full) | probe
        if (at := onward(control.log, position.next)) != position.next:
            # The leader epochs of the skipped records are unknown.
            position = replace(position, next=at, leader_epoch=-1)
        slices = self._trainer.measures.of_slices() if durable else ()
        draft = self.draft("recent", position, control, account, topic_id, slices)
        saving = None
        if durable:
            log = replace(draft.log, first=position.durable_first)
            since = replace(draft, kind="delta", parent=position.durable or None, log=log)
            saving = Saving(since, checkpoint.changes(self._trainer) | probe | self._updates.kept())
        self._metrics.publish_stall_seconds.observe(time.perf_counter() - began)
        self._publisher.offer(draft, served, saving)
        published_s = self._clocks.elapsed()
        self._pace.published(published_s)
        if durable:
            self._saved_s = published_s
        if is_full:
            gauges.show_version(draft.metrics, self._trainer.tables, self._metrics)
            gauges.show_quality(draft.metrics, self._metrics)
            gauges.show_churn(draft.metrics, self._metrics)
        if durable:
            gauges.show_slices(slices, self._metrics)
        return position.handed_over(durable)

    def publish_first(
        self,
        position: TrainingPlace,
        control: Control,
        account: Mapping[str, int],
        topic_id: str,
        tensors: Mapping[str, Any],
    ) -> TrainingPlace:
        """Publishes the first version of an epoch that does not just continue; returns the position once it is durable.

        It is a base if there is no version before it.
        """
        kind: Kind = "delta" if position.parent else "base"
        draft = self.draft(kind, position, control, account, topic_id, self._trainer.measures.of_slices())
        self._publisher.save(Saving(draft, {**tensors, **self._probed.answers()}))
        (published,) = self.settle(wait=True)
        self._metrics.version.set(published.version)
        return position.at_version(published).handed_over(True)

    def draft(
        self,
        kind: Kind,
        position: TrainingPlace,
        control: Control,
        account: Mapping[str, int],
        topic_id: str,
        slices: Sequence[SliceMeasures] = (),
    ) -> Draft:
        """The draft of a version with the present weights.

        The parent of a recent version is the last version, that of others the last durable one.
        """
        trainer, model, counters = self._trainer, self._model, self._trainer.counters
        parent, first = (
            (position.parent, position.first) if kind == "recent" else (position.durable, position.durable_first)
        )
        verdict, near = self._updates.verdict()
        return Draft(
            kind=kind,
            epoch=position.epoch,
            parent=parent or None,
            log=LogRange(
                *(self._topic, topic_id, TRAINING_PARTITION, first, position.next),
                epoch_at(control.log, position.next),
                position.leader_epoch,
            ),
            sources=tuple(position.marks.items()),
            steps=counters.steps,
            rows=counters.trained,
            created_at_ms=int(self._clocks.wall() * 1000),
            event_time_ms=counters.event_time_ms,
            spec=model.spec,
            program=model.program,
            salt=str(model.about["salt"]),
            mask_generation=control.mask.generation,
            metrics=trainer.measures.evaluation.values()
            | trainer.measures.progressive.values()
            | dict(sliced.values(slices))
            | ({} if trainer.churn is None else trainer.churn.values())
            | {f"account.{name}": float(value) for name, value in account.items()}
            | {TOLD_MS: float(position.told_ms)},
            environment=model.environment,
            erased=position.erased,
            erasures=position.erasures,
            verdict=verdict,
            guard=near,
        )
