"""Decides when the learner's work becomes a version, recent or durable, and copies its data in the step thread.

`ProbedRanker` computes the trainer's own answers to a version's probe, see `state/probe.py`. A process that serves the
version compares its answers with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf

from state import probe
from state.metrics import TrainerMetrics
from state.registry.control import Control
from state.registry.log_line import onward
from state.registry.manifest import Draft, Kind, Manifest
from state.registry.registry import MOST_BETWEEN
from trainer import gauges
from trainer.engine.step import Trainer
from trainer.holding import UpdateGuard
from trainer.measures.breakdown import SliceMeasures, shown_of
from trainer.model.ranker import Ranker
from trainer.place import TrainingPlace
from trainer.versions import checkpoint
from trainer.versions.content import Array
from trainer.versions.draft import Drafter
from trainer.versions.publisher import Publisher, Saving

LATE_PACES = 5
"""Intervals between two versions where learning is late."""

PROBE_S = 1.0
"""Least seconds between recent versions that carry a probe: computing one costs the trainer and each host several ms."""


class ProbedRanker:
    """Answers the probe with the current weights; only the step thread may call it.

    Args:
        ranker: The model.
    """

    def __init__(self, ranker: Ranker) -> None:
        # On the CPU, because serving runs there and an accelerator may round differently.
        with tf.device("/CPU:0"):
            shapes = {name: tuple(spec.shape) for name, spec in ranker.specs().items()}
            given = {name: tf.constant(value) for name, value in probe.inputs(shapes).items()}
        self._ranker, self._predict = ranker, tf.function(lambda: ranker.predict(given), autograph=False)

    def answers(self) -> dict[str, Array]:
        """The tensors `probe.<output>` of a version with these weights."""
        with tf.device("/CPU:0"):
            self._ranker.sync_variables()
            outputs = self._predict()
        return {f"{probe.PREFIX}{name}": np.array(value.numpy()) for name, value in outputs.items()}


class Publications:
    """The learner's versions, one under way at most. The step thread calls every method.

    Args:
        publisher: Writes them in the background.
        drafter: Fills in what all manifests have.
        trainer: The weights.
        metrics: The trainer's metrics.
        pace_s: Least seconds between two.
        durable_s: Least seconds between two durable ones.
        clock: Wall clock in seconds.
        elapsed: Monotonic seconds.
        updates: Judges what becomes a version.
    """

    def __init__(
        self,
        publisher: Publisher,
        drafter: Drafter,
        trainer: Trainer,
        metrics: TrainerMetrics,
        pace_s: float,
        durable_s: float,
        clock: Callable[[], float],
        elapsed: Callable[[], float],
        updates: UpdateGuard,
    ) -> None:
        self._updates = updates
        self._publisher, self._drafter, self._trainer = publisher, drafter, trainer
        self._metrics, self._pace_s, self._clock, self._elapsed = metrics, pace_s, clock, elapsed
        self._durable_s, self._probed = durable_s, ProbedRanker(trainer.model)
        self._last_s = self._saved_s = self._probed_s = float("-inf")

    @property
    def busy(self) -> bool:
        """Whether a version is under way, or was not settled yet."""
        return self._publisher.busy

    def begin(self) -> None:
        """At the beginning of an epoch, or after a start: the first version is due a pace later, and durable."""
        self._last_s, self._saved_s = self._elapsed(), float("-inf")

    def due(self, place: TrainingPlace, control: Control, late_s: float = 0.0) -> bool:
        """Whether a version, or a durable one, is due now.

        Each version costs the trainer and every serving host time, whatever it learned. Where learning is late, versions
        are therefore as far apart as it is late, up to `LATE_PACES` times the usual interval.

        Args:
            place: The trainer's position.
            control: The generation that it learns under.
            late_s: How long the last record that was taken had waited in the log.
        """
        if not (place.changed or place.unsaved) or not control.publishing or self.busy or not self._updates.passes:
            return False
        now_s, pace_s = self._elapsed(), min(max(late_s, self._pace_s), LATE_PACES * self._pace_s)
        return now_s - self._last_s >= pace_s and (place.changed or now_s - self._saved_s >= self._durable_s)

    def settle(self, wait: bool = False) -> Manifest | None:
        """The version that has been published since the last call; see `Publisher.settle`.

        Raises:
            WrongEpoch: It was refused, because control is at another epoch.
            OSError: The disk refused.
        """
        made = self._publisher.settle(wait)
        if made is not None:
            self._metrics.version.set(made.version)
        return made

    def publish(
        self, place: TrainingPlace, control: Control, account: Mapping[str, int], topic_id: str, last: bool = False
    ) -> TrainingPlace:
        """Hands the changes to the publisher; the copy is made here. Returns the position afterwards.

        Args:
            place: The trainer's position.
            control: The generation that it learned under.
            account: The outcomes of the rows.
            topic_id: Of the training log.
            last: Makes it durable, whenever the last durable one was.
        """
        began = time.perf_counter()
        durable = (
            last
            or self._elapsed() - self._saved_s >= self._durable_s
            or place.parent - place.durable >= MOST_BETWEEN - 1
        )
        probe = {}
        if durable or self._elapsed() - self._probed_s >= PROBE_S:
            probe, self._probed_s = self._probed.answers(), self._elapsed()
        served = checkpoint.served(self._trainer) | probe
        if (at := onward(control.log, place.next)) != place.next:
            # The leader epochs of the skipped records are unknown.
            place = replace(place, next=at, leader_epoch=-1)
        slices = self.slices() if durable else ()
        draft = self.draft("recent", place, control, account, topic_id, slices)
        saving = None
        if durable:
            log = replace(draft.log, first=place.durable_first)
            since = replace(draft, kind="delta", parent=place.durable or None, log=log)
            saving = Saving(since, checkpoint.changes(self._trainer) | probe | self._updates.kept())
        self._metrics.publish_stall_seconds.observe(time.perf_counter() - began)
        self._publisher.offer(draft, served, saving)
        self._last_s = self._elapsed()
        if durable:
            self._saved_s = self._last_s
        gauges.show_version(draft.metrics, self._trainer.tables, self._metrics)
        gauges.show_quality(draft.metrics, self._metrics)
        gauges.show_churn(draft.metrics, self._metrics)
        if durable:
            gauges.show_slices(slices, self._metrics)
        return place.handed_over(durable)

    def publish_first(
        self,
        place: TrainingPlace,
        control: Control,
        account: Mapping[str, int],
        topic_id: str,
        tensors: Mapping[str, Any],
    ) -> TrainingPlace:
        """Publishes the first version of an epoch that does not just continue; returns the position once it is durable.

        So serving has a version to use. It is a base if there is no version before it.

        Raises:
            WrongEpoch: Control is at another epoch by now.
            OSError: The disk refused.
        """
        kind: Kind = "delta" if place.parent else "base"
        draft = self.draft(kind, place, control, account, topic_id, self.slices())
        self._publisher.save(Saving(draft, {**tensors, **self._probed.answers()}))
        made = self.settle(wait=True)
        assert made is not None, "it was offered"
        return place.at_version(made).handed_over(True)

    def slices(self) -> Sequence[SliceMeasures]:
        """The present measures of slices."""
        trainer = self._trainer
        return trainer.breakdown.measures(shown_of(trainer.settings.events.actions, trainer.slices))

    def draft(
        self,
        kind: Kind,
        place: TrainingPlace,
        control: Control,
        account: Mapping[str, int],
        topic_id: str,
        slices: Sequence[SliceMeasures] = (),
    ) -> Draft:
        """The manifest of a version made now."""
        now_ms = int(self._clock() * 1000)
        verdict = self._updates.verdict()
        return self._drafter.draft(kind, place, self._trainer, account, topic_id, control, now_ms, verdict, slices)
