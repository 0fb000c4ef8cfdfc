"""Brings versions that have a label and are not on this host, one step at a time, while answers are where control wants them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from deploy.serving.refusals import Refusals
from deploy.serving.route import onto_what_is_here
from state.errors import CorruptVersion, UnknownVersion
from state.registry.manifest import Manifest
from state.registry.registry import Registry
from state.rows.store import RowStore


class Labelled:
    """Applies what labelled versions lack; used by the thread that writes the rows.

    Args:
        registry: Where versions are.
        rows: The host's row store.
        refusals: What cannot be had.
        refuse: Is told the kind of a version that cannot be had, its number, and why.
        apply: Applies a step; answers stay where they are. With the flag also where it is here, in a lane of its own.
    """

    def __init__(
        self,
        registry: Registry,
        rows: RowStore,
        refusals: Refusals,
        refuse: Callable[[str, int, Exception], None],
        apply: Callable[[Manifest, bool], None],
    ) -> None:
        self._registry, self._rows = registry, rows
        self._refusals, self._refuse, self._apply = refusals, refuse, apply
        self._target: int | None = None
        self._steps: list[Manifest] = []
        self._anew = False

    def step(self, labels: Iterable[tuple[str, int]], here: Collection[int]) -> bool:
        """Takes one step towards the first labelled version that is not here; says whether there was one to take."""
        missing = [version for _, version in labels if version not in here]
        if self._target not in missing:
            self._target, self._steps = None, []
        for version in [self._target] if self._target is not None else missing:
            try:
                if not self._steps:
                    self._find(version, here)
                if self._refusals.blocks(self._steps):
                    self._target, self._steps = None, []
                    continue
                self._apply(self._steps[0], self._anew)
            except (CorruptVersion, UnknownVersion) as error:
                self._refuse(self._steps[0].kind if self._steps else "base", version, error)
                self._target, self._steps = None, []
                continue
            self._target = version
            self._steps.pop(0)
            return True
        return False

    def _find(self, version: int, here: Collection[int]) -> None:
        """The steps to a version: onto what is here, or all anew in a lane of their own."""
        lead = onto_what_is_here(version, self._registry, self._rows, here)
        self._anew = lead is None
        if lead is None:
            base, deltas = self._registry.chain(version)
            lead = [base, *deltas]
        self._steps = lead
