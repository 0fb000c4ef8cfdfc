"""Builds the trainer that the settings ask for."""

from __future__ import annotations

from state.config.settings import Settings
from state.features.spec import FeatureSpec
from trainer.engine.step import Trainer
from trainer.model.preprocessing import Preprocessing


def trainer_of(settings: Settings, spec: FeatureSpec, preprocessing: Preprocessing | None = None) -> Trainer:
    """An untrained trainer. With a privacy budget it learns with differential privacy.

    Args:
        settings: All settings.
        spec: The feature spec of the micro-batches.
        preprocessing: `[B, D]` float32 raw integers to `[B, D']`; None takes logarithms.

    Raises:
        SettingsError: A budget is set, and the noise key is missing.
    """
    if not settings.privacy.epsilon:
        return Trainer(settings, spec, preprocessing)
    # Imported here, because the privacy accountant takes a second to load.
    from trainer.engine.private_step import PrivateTrainer

    return PrivateTrainer(settings, spec, preprocessing)
