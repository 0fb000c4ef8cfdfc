"""Which versions lead from what a host has to the version it wants, in which order."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from deploy.serving.refusals import Refusals
from state.errors import CorruptVersion, UnknownVersion
from state.registry.manifest import Manifest, sees
from state.registry.registry import Registry
from state.rows.store import RowStore


@dataclass
class Route:
    """How to get to a version.

    Attributes:
        target: The version.
        steps: What is still to apply, in this order; nothing where it is here.
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
    recents: Collection[int],
    refusals: Refusals,
    refuse: Callable[[str, int, Exception], None],
) -> Route | None:
    """The way to `wanted` without a version that was refused a moment ago; None while there is none.

    1. Recent versions, from one that is here.
    2. Durable ones from one that is here, or a base and those since, up to the last durable one before `wanted`;
       recent ones from there on.

    Args:
        wanted: A version. Where it is a recent one that nothing leads to, the way is to the last durable one before it.
        registry: Where versions are.
        rows: The host's row store.
        here: The versions in it.
        recents: The recent versions that can be had.
        refusals: What cannot be had.
        refuse: Is told the kind of a version that cannot be read, its number, and why.
    """
    # 1.
    steps = recent_steps(wanted, registry, here, recents)
    first = steps[0].parent if steps else wanted
    if steps and first in here and rows.accepts(steps[0]) and not refusals.blocks(steps):
        return Route(wanted, steps, rebuild=False)
    # 2.
    durable = _last_durable(steps[-1], registry) if steps and wanted not in registry.versions() else wanted
    if durable is None or (not steps and wanted in recents and wanted not in registry.versions()):
        return None
    tail = [step for step in steps if step.version > durable] if durable >= (first or 0) else []
    target = tail[-1].version if tail else durable
    if durable in here and not tail:
        return Route(durable, [], rebuild=False)
    try:
        lead = onto_what_is_here(durable, registry, rows, here)
        if lead is not None and not refusals.blocks(lead):
            return Route(target, [*lead, *tail], rebuild=False)
    except (CorruptVersion, UnknownVersion) as error:
        refuse("delta", durable, error)
    try:
        base, deltas = registry.chain(durable)
    except (CorruptVersion, UnknownVersion) as error:
        refuse("base", durable, error)
        return None
    lead = [base, *deltas]
    return None if refusals.blocks(lead) else Route(target, [*lead, *tail], rebuild=True)


def recent_steps(wanted: int, registry: Registry, here: Collection[int], recents: Collection[int]) -> list[Manifest]:
    """The recent versions that lead to `wanted`, oldest first, back to one that is here or that no recent one leads to."""
    steps: list[Manifest] = []
    version: int | None = wanted
    while version is not None and version not in here and version in recents:
        try:
            found = registry.manifest(version, "recent")
        except (CorruptVersion, UnknownVersion):
            break
        steps.append(found)
        version = found.parent
    return steps[::-1]


def _last_durable(version: Manifest, registry: Registry) -> int | None:
    """The newest durable version that a recent one descends from."""
    return max((one for one in registry.versions() if sees(version.visible, one)), default=None)


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
