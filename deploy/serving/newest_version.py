"""Finds the newest version of an epoch, of either lifetime, whose manifest can be read."""

from __future__ import annotations

from collections.abc import Callable

from deploy.serving.refusals import Refusals
from state.errors import CorruptVersion, UnknownVersion
from state.registry.manifest import Manifest
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
        self._lost: frozenset[int] = frozenset()

    def of(self, epoch: int) -> int | None:
        """The newest version of `epoch`; None where there is none."""
        registry = self._registry
        seen = (epoch, registry.recents()[-1:], registry.deltas()[-1:], registry.bases()[-1:], self._lost)
        if self._found[0] != seen:
            self._found = (None, self._find(epoch))
            if not self._refusals.of_manifests():
                self._found = (seen, self._found[1])
        return self._found[1]

    def recents(self) -> frozenset[int]:
        """The recent versions that can be had, as far as is known."""
        return frozenset(self._registry.recents()) - self._lost

    def lose(self, version: int) -> None:
        """A recent version cannot be had: it went meanwhile, or a power cut damaged it. Durable ones lead past it."""
        self._lost = self._lost.intersection(self._registry.recents()) | {version}

    def _find(self, epoch: int) -> int | None:
        recents = self.recents()
        for version in sorted({*self._registry.versions(), *recents}, reverse=True):
            found = self._recent(version) if version in recents else self._durable(version)
            if found is None:
                continue
            if found.epoch == epoch:
                return version
            if found.epoch < epoch:
                return None
        return None

    def _durable(self, version: int) -> Manifest | None:
        try:
            return self._registry.manifest(version)
        except (CorruptVersion, UnknownVersion) as error:
            self._refuse("manifest", version, error)
            return None

    def _recent(self, version: int) -> Manifest | None:
        try:
            return self._registry.manifest(version, "recent")
        except (CorruptVersion, UnknownVersion):
            self.lose(version)
            return self._durable(version) if version in self._registry.versions() else None
