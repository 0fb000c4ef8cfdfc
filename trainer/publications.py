"""Decides when the learner's work becomes a version, recent or durable, and copies its data in the step thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf

from state import probe
from state.config.settings import Settings
from state.metrics import TrainerMetrics
from state.registry.control import Control
from state.registry.log_line import onward
from state.registry.manifest import Draft, Kind, Manifest
from state.registry.registry import MOST_BETWEEN
from trainer import gauges
from trainer.engine.step import Trainer
from trainer.holding import UpdateGuard
from trainer.measures.breakdown import SliceMeasures
from trainer.model.ranker import Ranker
from trainer.place import TrainingPlace
from trainer.versions import checkpoint
from trainer.versions.content import Array
from trainer.versions.publisher import Drafter, Publisher, Saving

LATE_PACES = 5
"""The most intervals between two versions where learning is late, or steps leave little time."""

FULL_S = 1.0
"""Least seconds between recent versions that carry a probe and changed item lists. Both cost the trainer and each host
several ms, and most lists that change in one version change in the next one too."""


class ProbedRanker:
    """Answers a version's probe with the current weights; serving compares its answers with these (`state/probe.py`).

    Only the step thread may call it.
    """

    def __init__(self, ranker: Ranker) -> None:
        # On the CPU, because serving runs there and an accelerator may round differently.
        with tf.device("/CPU:0"):
            shapes = {name: tuple(spec.shape) for name, spec in ranker.specs().items()}
            inputs = {name: tf.constant(value) for name, value in probe.inputs(shapes).items()}
        self._ranker, self._predict = ranker, tf.function(lambda: ranker.predict(inputs), autograph=False)

    def answers(self) -> dict[str, Array]:
        """The tensors `probe.<output>` of a version with these weights."""
        with tf.device("/CPU:0"):
            self._ranker.sync_variables()
            outputs = self._predict()
        return {f"{probe.PREFIX}{name}": np.array(value.numpy()) for name, value in outputs.items()}


class Publications:
    """The learner's versions, at most one of them being written. The step thread calls every method.

    Args:
        settings: Pace of versions, and of durable ones.
        publisher: Writes them in the background.
        drafter: Fills in what all manifests have.
        trainer: The weights.
        metrics: The trainer's metrics.
        updates: Judges what becomes a version.
        clock, elapsed: Wall clock and monotonic clock in seconds.
    """

    def __init__(
        self,
        settings: Settings,
        publisher: Publisher,
        drafter: Drafter,
        trainer: Trainer,
        metrics: TrainerMetrics,
        updates: UpdateGuard,
        clock: Callable[[], float],
        elapsed: Callable[[], float],
    ) -> None:
        self._updates = updates
        self._publisher, self._drafter, self._trainer = publisher, drafter, trainer
        self._metrics, self._pace_s, self._clock, self._elapsed = metrics, settings.trainer.publish_s, clock, elapsed
        self._durable_s, self._probed = settings.registry.durable_s, ProbedRanker(trainer.model)
        self._last_s = self._saved_s = self._full_s = float("-inf")

    @property
    def busy(self) -> bool:
        """Whether a version is being written, or was not settled yet."""
        return self._publisher.busy

    def begin(self) -> None:
        """Begins an epoch, or continues after a start: the first version is due a pace later, and durable."""
        self._last_s, self._saved_s = self._elapsed(), float("-inf")

    def due(self, position: TrainingPlace, control: Control, late_s: float = 0.0, steps_s: float = 0.0) -> bool:
        """Whether a version, or a durable one, is due now.

        Each version costs the trainer and every serving host time. If learning is late by `late_s`, versions are
        therefore that far apart, up to `LATE_PACES` times the usual interval. The interval also grows as steps leave
        less time: `steps_s` is what they took since the last version.
        """
        if (
            not (position.changed or position.unsaved)
            or not control.publishing
            or self.busy
            or not self._updates.passes
        ):
            return False
        now_s = self._elapsed()
        since_s = now_s - self._last_s
        idle = 1.0 - steps_s / since_s if since_s > steps_s else 0.0
        pace_s = self._pace_s / max(idle, 1.0 / LATE_PACES)
        pace_s = max(pace_s, min(late_s, LATE_PACES * self._pace_s))
        return since_s >= pace_s and (position.changed or now_s - self._saved_s >= self._durable_s)

    def settle(self, wait: bool = False) -> Manifest | None:
        """The version that has been published since the last call; see `Publisher.settle`.

        Raises:
            WrongEpoch: It was refused, because control is at another epoch.
            OSError: The disk cannot be written.
        """
        published = self._publisher.settle(wait)
        if published is not None:
            self._metrics.version.set(published.version)
        return published

    def publish(
        self, position: TrainingPlace, control: Control, account: Mapping[str, int], topic_id: str, last: bool = False
    ) -> TrainingPlace:
        """Hands a copy of the changes to the publisher. Returns the position afterwards.

        Args:
            position: The trainer's position.
            control: The generation that it learned under.
            account: The outcomes of the rows.
            topic_id: Of the training log.
            last: Whether the version is durable in any case.
        """
        began = time.perf_counter()
        durable = (
            last
            or self._elapsed() - self._saved_s >= self._durable_s
            or position.parent - position.durable >= MOST_BETWEEN - 1
        )
        probe, is_full = {}, durable or self._elapsed() - self._full_s >= FULL_S
        if is_full:
            probe, self._full_s = self._probed.answers(), self._elapsed()
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
        self._last_s = self._elapsed()
        if durable:
            self._saved_s = self._last_s
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

        Raises:
            WrongEpoch: Control is at another epoch by now.
            OSError: The disk cannot be written.
        """
        kind: Kind = "delta" if position.parent else "base"
        draft = self.draft(kind, position, control, account, topic_id, self._trainer.measures.of_slices())
        self._publisher.save(Saving(draft, {**tensors, **self._probed.answers()}))
        published = self.settle(wait=True)
        assert published is not None, "it was offered"
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
        """The manifest of a version made now."""
        now_ms = int(self._clock() * 1000)
        verdict = self._updates.verdict()
        return self._drafter.draft(kind, position, self._trainer, account, topic_id, control, now_ms, verdict, slices)
