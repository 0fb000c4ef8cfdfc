"""Builds the trainer that the settings describe."""

from __future__ import annotations

from state.config.settings import Settings
from state.features.spec import FeatureSpec
from trainer.engine.divided_step import DividedTrainer
from trainer.engine.step import Trainer
from trainer.group import Group
from trainer.model.preprocessing import Preprocessing


def trainer_of(
    settings: Settings, spec: FeatureSpec, preprocessing: Preprocessing | None = None, group: Group | None = None
) -> Trainer:
    """An untrained trainer, which shares the training with the workers of `group`. With a privacy budget it is private."""
    if group is not None:
        return DividedTrainer(settings, spec, preprocessing, group)
    if not settings.privacy.epsilon:
        return Trainer(settings, spec, preprocessing)
    # Imported here, because the privacy accountant takes a second to load.
    from trainer.engine.private_step import PrivateTrainer

    return PrivateTrainer(settings, spec, preprocessing)
