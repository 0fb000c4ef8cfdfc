"""Learns the training log of golden data further, and keeps what each step did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from state.config.settings import Settings
from state.features.mask import Mask, always
from state.features.spec import FeatureSpec
from state.microbatch.batch import MicroBatch
from state.registry.registry import Registry
from tests.golden.archive import Document, Topic
from tests.trainer.batches import without_network
from trainer import device
from trainer.engine.step import Trainer
from trainer.intake import RecordFilter
from trainer.model.preprocessing import preprocessing_of
from trainer.versions import checkpoint, content

STEPS_ON = 4
STEPS_FROM_NOTHING = 8


def new_trainer(settings: Settings, registry: Registry) -> Trainer:
    """A trainer with the preprocessing that the run's bootstrap made; fixes TensorFlow's threads first.

    Its measures score the model alone, as those of 0.1.0.
    """
    settings = replace(settings, trainer=replace(settings.trainer, interests="model"))
    device.prepare(settings.trainer.device, settings.trainer.threads)
    spec = FeatureSpec.from_settings(settings)
    return Trainer(settings, spec, preprocessing_of(registry.specs.transform(spec.digest)))


def learn_on(trainer: Trainer, registry: Registry, log: Topic, version: int | None, steps: int, mask: Mask) -> Document:
    """The digests of `trainer` after each of `steps` further records of the log.

    Args:
        trainer: Whatever it was before.
        registry: Of the run.
        log: The training log.
        version: Where to begin; None for nothing.
        steps: Records to learn; a record of which nothing is left to learn from is no step.
        mask: The rows to leave out.
    """
    newest = registry.manifest(registry.versions()[-1])
    at, marks = log.ends[0][0], {}
    if version is None:
        checkpoint.begin(trainer, registry.specs.spec(newest.spec))
    else:
        base = checkpoint.restore(registry, version, trainer, newest.spec)
        at, marks = base.log.next, base.marks
    found: list[Document] = [{"digest": checkpoint.digest(trainer)}]
    own = RecordFilter(newest.spec, newest.salt)
    for one in log.records:
        if one["offset"] < at or len(found) > steps:
            continue
        taken = own.take_in(one["value"], marks, always(mask), f"offset {one['offset']}")
        marks = taken.marks
        if len(taken.batch):
            found.append(step(trainer, one["offset"], taken.batch))
    return {
        "version": version,
        "mask": mask.to_json(),
        "steps": found,
        "marks": {str(source): after for source, after in sorted(marks.items())},
        "norms": norms(
            {
                name: one
                for name, one in without_network(checkpoint.full(trainer)).items()
                if not name.startswith(content.ADDED)
            }
        ),
    }


def step(trainer: Trainer, offset: int, batch: MicroBatch) -> Document:
    """What a step over the record at `offset` did."""
    report = trainer.step(batch)
    return {
        "offset": offset,
        "digest": checkpoint.digest(trainer),
        "rows": report.rows,
        "verdict": report.verdict.value,
        "interest_log_loss": finite(report.interest_log_loss),
        "engagement_log_loss": finite(report.quality.engagement_log_loss / report.quality.pairs),
        "grad_norm": finite(report.grad_norm),
        "top1": int(report.quality.total("top1")),
        "top5": int(report.quality.total("top5")),
        "targets": int(report.quality.total("rows")),
    }


def norms(tensors: Mapping[str, Any]) -> dict[str, list[float]]:
    """Sum and Euclidean norm of each tensor of floats: what is compared where bits are not comparable."""
    return {
        name: [float(tensor.astype(np.float64).sum()), float(np.linalg.norm(tensor.astype(np.float64)))]
        for name, tensor in sorted(tensors.items())
        if tensor.dtype.kind == "f"
    }


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if np.isfinite(value) else None
