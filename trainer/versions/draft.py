"""Drafts a version's manifest before it is published: log range, counts, metrics, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from state.config.settings import Settings
from state.registry.control import Control
from state.registry.log_line import epoch_at
from state.registry.manifest import TOLD_MS, Draft, Kind, LogRange
from trainer.engine.step import Trainer
from trainer.measures import breakdown
from trainer.measures.breakdown import SliceMeasures
from trainer.place import TrainingPlace
from trainer.versions import checkpoint


@dataclass(frozen=True)
class Drafter:
    """Drafts the versions of one process; holds the fields that all of them share.

    Attributes:
        topic: Name of the training log's topic.
        partition: Its partition.
        spec: Digest of the feature spec.
        program: SHA-256 of the program that fits the model.
        salt: Fingerprint of the salt.
        environment: What the bits of a step depend on besides the log.
    """

    topic: str
    partition: int
    spec: str
    program: str
    salt: str
    environment: Mapping[str, str]

    @classmethod
    def of(cls, settings: Settings, trainer: Trainer, spec: str, program: str, salt: str) -> Drafter:
        """The drafter of a process with these settings."""
        topic, partition = settings.kafka.microbatches_topic, settings.trainer.partition
        environment = checkpoint.environment(settings, trainer.device, trainer.engine.name)
        return cls(topic, partition, spec, program, salt, environment)

    def draft(
        self,
        kind: Kind,
        place: TrainingPlace,
        trainer: Trainer,
        account: Mapping[str, int],
        topic_id: str,
        control: Control,
        now_ms: int,
        judged: tuple[str, Mapping[str, float]] = ("", {}),
        slices: Sequence[SliceMeasures] = (),
    ) -> Draft:
        """The draft of a version with the current weights of `trainer`.

        Args:
            kind: `base`, `delta` or `recent`. The parent of a recent version is the last version, of others the last
                durable one.
            place: The trainer's position.
            trainer: Provides counters and metrics.
            account: Rows by outcome.
            topic_id: Id of the training log's topic.
            control: The control under which it learned: its mask, and the branch of the log.
            now_ms: Wall clock.
            judged: The guard's verdict, and how near its rules are to a hold.
            slices: The metrics of slices; empty for a version that is not durable.
        """
        counters = trainer.counters
        parent, first = (place.parent, place.first) if kind == "recent" else (place.durable, place.durable_first)
        return Draft(
            kind=kind,
            epoch=place.epoch,
            parent=parent or None,
            log=LogRange(
                *(self.topic, topic_id, self.partition, first, place.next),
                epoch_at(control.log, place.next),
                place.leader_epoch,
            ),
            sources=tuple(place.marks.items()),
            steps=counters.steps,
            rows=counters.trained,
            created_at_ms=now_ms,
            event_time_ms=counters.event_time_ms,
            spec=self.spec,
            program=self.program,
            salt=self.salt,
            mask_generation=control.mask.generation,
            metrics=trainer.measures.evaluation.values()
            | trainer.measures.progressive.values()
            | dict(breakdown.values(slices))
            | ({} if trainer.churn is None else trainer.churn.values())
            | {f"account.{name}": float(value) for name, value in account.items()}
            | {TOLD_MS: float(place.told_ms)},
            environment=self.environment,
            erased=place.erased,
            erasures=place.erasures,
            verdict=judged[0],
            guard=judged[1],
        )
