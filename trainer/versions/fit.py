"""Whether the version at hand has the weights of a ranker that is built: refused before its program is lowered."""

from __future__ import annotations

from state.config.sections import Model
from state.config.settings import Settings
from state.features.spec import FeatureSpec
from state.registry.model_fit import differences, require_fit, version_to_go_on_from
from state.registry.registry import Registry
from trainer.engine.build import TRANSITION, ranker_of
from trainer.engine.engine import CROSS
from trainer.engine.own_tables import EMBEDDINGS
from trainer.model.ranker import Ranker
from trainer.versions.program import preprocessing_of


def require_ranker_fits(registry: Registry, settings: Settings, spec: FeatureSpec, ranker: Ranker) -> None:
    """Refuses a ranker whose weights or rows the version at hand does not have, and nobody asked for an upgrade.

    Raises:
        ModelMismatch: It names what differs and what to type.
    """
    widths = dict.fromkeys(EMBEDDINGS, settings.model.dim) | dict(ranker.tables)
    dense = {name: tuple(one.shape) for name, one in ranker.dense.items()}
    require_fit(registry, settings, spec, dense, widths, (CROSS, TRANSITION))


def is_of_release(registry: Registry, settings: Settings, spec: FeatureSpec) -> bool:
    """Whether nothing but this release's own code can be what differs from the version at hand."""
    own, default = settings.model, Model()
    if (own.ranker, own.tower, own.preprocessing) != (default.ranker, default.tower, default.preprocessing):
        return False
    version = version_to_go_on_from(registry)
    return version is not None and not differences(registry, version, settings, spec)


def require_settings_fit(settings: Settings, spec: FeatureSpec) -> None:
    """As `require_ranker_fits`, of the ranker that the settings make; does nothing where nothing was trained.

    Raises:
        ModelMismatch: See there.
        SettingsError: There is no such ranker.
        RegistryError: The registry cannot be read.
    """
    if not settings.registry_dir.is_dir():
        return
    registry = Registry(settings.registry_dir)
    if registry.control() is not None and (name := registry.bootstrapped(spec.digest, settings.model)) is not None:
        preprocessing = preprocessing_of(registry.transform(name))
        require_ranker_fits(registry, settings, spec, ranker_of(settings, spec, preprocessing))
