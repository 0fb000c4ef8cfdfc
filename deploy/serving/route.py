"""Which versions lead from what a host has to the version it wants, in which order."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from deploy.serving.refusals import Refusals
from state.errors import CorruptVersion, UnknownVersion
from state.registry.manifest import Manifest
from state.registry.registry import Registry
from state.rows.store import RowStore


@dataclass
class Route:
    """How to get to a version.

    Attributes:
        target: The version.
        steps: What is still to apply, in this order.
        rebuild: Into a lane of their own; else onto what is here.
    """

    target: int
    steps: list[Manifest]
    rebuild: bool


def route_to(
    wanted: int,
    registry: Registry,
    rows: RowStore,
    here: Collection[int],
    refusals: Refusals,
    refuse: Callable[[str, int, Exception], None],
) -> Route | None:
    """The way to `wanted` without a version that was refused a moment ago; None while there is none.

    Args:
        wanted: A version.
        registry: Where versions are.
        rows: The host's row store.
        here: The versions in it.
        refusals: What cannot be had.
        refuse: Is told the kind of a version that cannot be read, its number, and why.
    """
    try:
        steps = onto_what_is_here(wanted, registry, rows, here)
        if steps is not None and not refusals.blocks(steps):
            return Route(wanted, steps, rebuild=False)
    except (CorruptVersion, UnknownVersion) as error:
        refuse("delta", wanted, error)
    try:
        base, deltas = registry.chain(wanted)
    except (CorruptVersion, UnknownVersion) as error:
        refuse("base", wanted, error)
        return None
    steps = [base, *deltas]
    return None if refusals.blocks(steps) else Route(wanted, steps, rebuild=True)


def onto_what_is_here(wanted: int, registry: Registry, rows: RowStore, here: Collection[int]) -> list[Manifest] | None:
    """Deltas from the nearest ancestor that is here; None where a base is needed.

    Raises:
        CorruptVersion, UnknownVersion: One of them cannot be read.
    """
    steps: list[Manifest] = []
    version = wanted
    deltas = set(registry.deltas())
    while version not in here:
        if version not in deltas:
            return None
        manifest = registry.manifest(version, "delta")
        if manifest.parent is None:
            return None
        steps.append(manifest)
        version = manifest.parent
    steps.reverse()
    return steps if steps and rows.accepts(steps[0]) else None
