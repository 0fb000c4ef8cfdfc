"""Builds the trainer that the settings describe, with the bootstrap's preprocessing and the newest version's program.

A trainer of a registry that continues in the environment of the newest version finds both without TensorFlow.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from state.config.settings import Settings
from state.errors import CorruptVersion, ProgramError, SettingsError, UnusableRegistry
from state.features.spec import FeatureSpec
from state.registry.manifest import Manifest
from state.registry.model_fit import version_to_go_on_from
from state.registry.registry import Registry
from state.registry.specs import Specs
from trainer.device import device_of
from trainer.engine.parts import learns_without_graph
from trainer.engine.step import Trainer
from trainer.model.model import F32, Analysed, Preprocessing
from trainer.versions import checkpoint
from trainer.versions.program import check_parity, sample

if TYPE_CHECKING:
    from trainer.group import Group

logger = logging.getLogger(__name__)


class PreparedTable:
    """See `StoredTable`; in the registry, for the processor and the TensorFlow of this process."""

    def __init__(self, specs: Specs, name: str) -> None:
        self._specs, self._name = specs, name

    def load(self) -> F32 | None:
        """See `StoredTable`."""
        content = self._specs.prepared(self._name, checkpoint.tensorflow_environment())
        return None if content is None else np.frombuffer(content, np.float32).reshape(1 << 16, -1)

    def save(self, table: F32) -> None:
        """See `StoredTable`. Where the disk refuses, the next start computes the table again."""
        try:
            self._specs.keep_prepared(self._name, checkpoint.tensorflow_environment(), table.tobytes())
        except UnusableRegistry as error:
            logger.warning("the next start loads TensorFlow again: %s", error)


def analysed(specs: Specs, name: str) -> Analysed:
    """The preprocessing of the bootstrap that has this name, see `Specs.bootstrapped`.

    Raises:
        SpecMismatch: There was no such bootstrap.
        CorruptVersion: A file of it is missing or fails its digest.
    """
    return Analysed(specs.transform(name), PreparedTable(specs, name))


def bootstrapped(settings: Settings, specs: Specs) -> Analysed:
    """See `analysed`; of the bootstrap of the settings' feature spec."""
    spec = FeatureSpec.from_settings(settings)
    return analysed(specs, specs.bootstrapped(spec.digest, settings.model) or spec.digest)


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


def bootstrapped_trainer(settings: Settings, specs: Specs, group: Group | None) -> Trainer:
    """See `trainer_of`; behind the preprocessing that the bootstrap of the settings' feature spec analysed."""
    return trainer_of(settings, FeatureSpec.from_settings(settings), bootstrapped(settings, specs), group)


def starts_without_graph(settings: Settings, registry: Registry) -> bool:
    """Whether a trainer of these settings probably needs no graph: it continues from the newest version, as it is."""
    spec = FeatureSpec.from_settings(settings)
    version = version_to_go_on_from(registry)
    try:
        device = device_of(settings.trainer.device)
        return (
            version is not None
            and settings.trainer.workers == 1
            and learns_without_graph(settings, device)
            and (version.spec, version.environment) == (spec.digest, checkpoint.environment(settings, device))
        )
    except SettingsError:
        return False


def program_of(
    registry: Registry, version: Manifest | None, spec: str, environment: Mapping[str, str], trainer: Trainer
) -> str:
    """The name of the program of the trainer's model in the registry.

    Lowering takes seconds and needs TensorFlow, so the program of `version` is reused where possible: that version was
    trained with this feature spec and in this environment, and its program computes what the trainer's engine does.
    """
    if version is not None and (version.spec, version.environment) == (spec, environment):
        model = trainer.model
        with suppress(ProgramError, CorruptVersion):
            program = registry.specs.program(version.program)
            check_parity(program, model.weights(), trainer.engine.predict, sample(model), "the model")
            return version.program
    from trainer.versions.lowering import build

    return registry.specs.add_program(build(trainer.ranker()))
