"""Builds the trainer that the settings describe."""

from __future__ import annotations

from state.config.settings import Settings
from state.features.spec import FeatureSpec
from state.registry.specs import Specs
from trainer import device
from trainer.engine.divided_step import DividedTrainer
from trainer.engine.step import Trainer
from trainer.group import Group
from trainer.model.preprocessing import Preprocessing
from trainer.versions.program import preprocessing_of


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


def bootstrapped_trainer(settings: Settings, specs: Specs, group: Group | None = None) -> Trainer:
    """See `trainer_of`; behind the preprocessing that the bootstrap of the settings' feature spec analysed."""
    # Threads are fixed before TensorFlow's first operation, which loading the graph is.
    device.prepare(settings.trainer.device, settings.trainer.threads)
    spec = FeatureSpec.from_settings(settings)
    name = specs.bootstrapped(spec.digest, settings.model) or spec.digest
    return trainer_of(settings, spec, preprocessing_of(specs.transform(name)), group)
