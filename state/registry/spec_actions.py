"""Names of actions by number, under each feature spec that was ever bootstrapped in this registry."""

from __future__ import annotations

from pathlib import Path

from state import layout
from state.errors import RegistryError, SpecMismatch
from state.features.spec import FeatureSpec
from state.registry.specs import Specs


class SpecActions:
    """Looks up the names of actions by the digest of a feature spec, with a cache.

    Args:
        registry: The registry's directory, which may not exist.
        own: The spec of the settings.
    """

    def __init__(self, registry: Path, own: FeatureSpec) -> None:
        self._registry = registry
        self._known = {own.digest: own.actions}

    def of(self, spec: str) -> tuple[str, ...] | None:
        """The names, in the order of their numbers; None for an unknown spec."""
        if spec not in self._known:
            try:
                # A reader does not create a registry.
                if not (self._registry / layout.SPECS).is_dir():
                    return None
                self._known[spec] = tuple(Specs(self._registry).spec(spec)["spec"]["actions"])
            except (SpecMismatch, RegistryError, KeyError):
                return None
        return self._known[spec]
