"""Builds the trainer that the settings describe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from state.config.settings import Settings
from state.features.spec import FeatureSpec
from trainer.engine.step import Trainer
from trainer.model.analysed import Analysed, Preprocessing

if TYPE_CHECKING:
    from trainer.group import Group


def trainer_of(
    settings: Settings,
    spec: FeatureSpec,
    preprocessing: Preprocessing | Analysed | None = None,
    group: Group | None = None,
) -> Trainer:
    """An untrained trainer, which shares the training with the workers of `group`. With a privacy budget it is private."""
    if group is not None:
        # Imported here, because workers are connected by TensorFlow.
        from trainer.engine.divided_step import DividedTrainer

        return DividedTrainer(settings, spec, preprocessing, group)
    if not settings.privacy.epsilon:
        return Trainer(settings, spec, preprocessing)
    # Imported here, because the privacy accountant takes a second to load.
    from trainer.engine.private_step import PrivateTrainer

    return PrivateTrainer(settings, spec, preprocessing)
