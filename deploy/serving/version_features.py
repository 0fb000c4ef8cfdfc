"""The features of a served version, which uses its own feature spec even if the settings have changed since.

The applier fetches the feature specs of versions from the registry, together with
their programs. A worker reads them on its host.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from state.disk import files as durable
from state.errors import RegistryError, SpecMismatch
from state.features.spec import FeatureSpec
from state.history.actions import Numbers, exchange
from state.ranking.crosses import Crosses
from state.registry.registry import Registry


@dataclass(frozen=True)
class VersionFeatures:
    """The definition of the features that a version's program takes.

    Attributes:
        spec: The version's feature spec.
        crosses: The crosses, with the version's columns.
        actions: Maps the number of an action in the settings to its number in the version; None if they are equal.
    """

    spec: FeatureSpec
    crosses: Crosses
    actions: Numbers | None = None


class SpecFiles:
    """Copies feature specs from the registry, so that workers read only this host's disk.

    Args:
        folder: The target directory.
        registry: The source registry.
    """

    def __init__(self, folder: Path, registry: Registry) -> None:
        self._folder = folder
        self._registry = registry
        self._brought: set[str] = set()

    def bring(self, digest: str) -> None:
        """Copies a missing spec durably; does nothing if the registry lacks it, because `FeaturesOf` reports that."""
        if digest in self._brought:
            return
        try:
            document: Mapping[str, Any] = self._registry.specs.spec(digest)["spec"]
        except (SpecMismatch, RegistryError, KeyError):
            return
        final = path_of(self._folder, digest)
        if not final.exists():
            durable.replace(final, json.dumps(document, sort_keys=True).encode())
        self._brought.add(digest)


def path_of(folder: Path, digest: str) -> Path:
    """Returns the path of a spec's file.

    >>> path_of(Path("programs"), "ab").as_posix()
    'programs/ab.spec.json'
    """
    return folder / f"{digest}.spec.json"


class FeaturesOf:
    """Returns the features of each version that a worker serves. Used by one thread.

    Args:
        folder: The directory with the applier's copies of specs.
        spec: The feature spec of the settings.
        crosses: Builds the crosses for a feature spec, with the other columns of the settings.
    """

    def __init__(self, folder: Path, spec: FeatureSpec, crosses: Callable[[FeatureSpec], Crosses]) -> None:
        self._folder, self._spec, self._crosses = folder, spec, crosses
        self._known = {spec.digest: VersionFeatures(spec, crosses(spec))}

    def of(self, version: int, digest: str) -> VersionFeatures:
        """Returns the features of a version.

        Raises:
            SpecMismatch: The spec is not on this host, or belongs to a release that computes other windows.
        """
        if digest not in self._known:
            self._known[digest] = self._read(version, digest)
        return self._known[digest]

    def _read(self, version: int, digest: str) -> VersionFeatures:
        try:
            spec = FeatureSpec.from_json(path_of(self._folder, digest).read_text())
            if spec.digest != digest:
                raise ValueError("it is of another one")
        except (OSError, ValueError, KeyError) as error:
            raise SpecMismatch(
                f"version {version} has the feature spec {digest[:12]}, the settings give {self._spec.digest[:12]}, and "
                f"its windows cannot be computed here ({error})",
                "use the settings of the stream, or wait for the first version of an upgrade",
            ) from error
        return VersionFeatures(spec, self._crosses(spec), exchange(self._spec.actions, spec.actions))
