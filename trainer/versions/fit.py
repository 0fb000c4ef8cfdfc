"""Checks that the current version fits the weights of a ranker, before the ranker's program is lowered."""

from __future__ import annotations

from state.config.sections import Model
from state.config.settings import Settings
from state.features.spec import FeatureSpec
from state.registry.model_fit import differences, require_fit, version_to_go_on_from
from state.registry.registry import Registry
from trainer.engine.build import EMBEDDINGS, TRANSITION, ranker_of
from trainer.engine.engine import CROSS
from trainer.model.ranker import Ranker
from trainer.versions.program import preprocessing_of


def require_ranker_fits(registry: Registry, settings: Settings, spec: FeatureSpec, ranker: Ranker) -> None:
    """Refuses a ranker whose weights or rows differ from the current version, unless an upgrade was requested.

    Raises:
        ModelMismatch: It names what differs and the command to run.
    """
    widths = dict.fromkeys(EMBEDDINGS, settings.model.dim) | dict(ranker.tables)
    dense = {name: tuple(one.shape) for name, one in ranker.dense.items()}
    require_fit(registry, settings, spec, dense, widths, (CROSS, TRANSITION))


def is_of_release(registry: Registry, settings: Settings, spec: FeatureSpec) -> bool:
    """Whether only this release's own code can differ from the current version: no custom code, same settings."""
    own, default = settings.model, Model()
    if (own.ranker, own.tower, own.preprocessing) != (default.ranker, default.tower, default.preprocessing):
        return False
    version = version_to_go_on_from(registry)
    return version is not None and not differences(registry, version, settings, spec)


def require_settings_fit(settings: Settings, spec: FeatureSpec) -> None:
    """Like `require_ranker_fits`, for the ranker of the settings; does nothing if nothing was trained.

    Raises:
        ModelMismatch: See `require_ranker_fits`.
        SettingsError: There is no such ranker.
        RegistryError: The registry cannot be read.
    """
    if not settings.registry_dir.is_dir():
        return
    registry = Registry(settings.registry_dir)
    if (
        registry.control() is not None
        and (name := registry.specs.bootstrapped(spec.digest, settings.model)) is not None
    ):
        preprocessing = preprocessing_of(registry.specs.transform(name))
        require_ranker_fits(registry, settings, spec, ranker_of(settings, spec, preprocessing))
