"""Finds the newest version of an epoch whose manifest can be read."""

from __future__ import annotations

from collections.abc import Callable

from deploy.serving.refusals import Refusals
from state.errors import CorruptVersion, UnknownVersion
from state.registry.registry import Registry


class NewestVersion:
    """Lists the registry again only when there is another version.

    Args:
        registry: Where versions are.
        refusals: What cannot be had.
        refuse: Is told `manifest`, the number of a version whose manifest cannot be read, and why.
    """

    def __init__(self, registry: Registry, refusals: Refusals, refuse: Callable[[str, int, Exception], None]) -> None:
        self._registry = registry
        self._refusals = refusals
        self._refuse = refuse
        self._found: tuple[object, int | None] = (None, None)

    def of(self, epoch: int) -> int | None:
        """The newest version of `epoch`; None where there is none."""
        seen = (epoch, self._registry.deltas()[-1:], self._registry.bases()[-1:])
        if self._found[0] != seen:
            self._found = (None, self._find(epoch))
            if not self._refusals.of_manifests():
                self._found = (seen, self._found[1])
        return self._found[1]

    def _find(self, epoch: int) -> int | None:
        for version in reversed(self._registry.versions()):
            try:
                found = self._registry.manifest(version)
            except (CorruptVersion, UnknownVersion) as error:
                self._refuse("manifest", version, error)
                continue
            if found.epoch == epoch:
                return version
            if found.epoch < epoch:
                return None
        return None
