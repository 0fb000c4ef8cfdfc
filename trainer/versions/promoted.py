"""Makes the live trainer what a trial's trainer was at its last version, and says what the first version of the epoch holds.

That version is a delta of the live version that the epoch begins from, as any
upgrade's is: all that the trial learned, and the end of all rows that only the
live one had. So nothing that reads versions needs to know of trials.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from state import layout
from state.errors import UnknownVersion
from state.registry.manifest import Manifest
from state.registry.registry import Registry
from state.registry.versions import Versions
from state.rows.tables import tables_in
from trainer.engine.step import Trainer
from trainer.versions import checkpoint, content
from trainer.versions.carrying import plan as carrying_plan
from trainer.versions.carrying import removals
from trainer.versions.content import PENDING, Array, Tensors

TRIAL = "trial"
"""In the plan of a control generation: the name of the trial that the epoch goes on from."""


def take_over(
    live: Registry, plan: Mapping[str, Any], version: int, trainer: Trainer, spec: str
) -> tuple[Manifest, dict[str, Array]]:
    """Makes `trainer` the one that published the trial's version.

    Args:
        live: The live registry.
        plan: Of the generation that began the epoch.
        version: The live version that the epoch begins from.
        trainer: Is cleared first.
        spec: Digest of its feature spec.

    Returns:
        The trial's manifest in the place of the live version, and what the epoch's first version holds.

    Raises:
        UnknownVersion: The trial's registry is gone, or a version of it.
        CorruptVersion: A file fails its digest.
    """
    path = layout.trial_registry(trainer.settings.state_dir, str(plan[TRIAL]))
    if not path.is_dir():
        raise UnknownVersion(
            f"epoch goes on from trial {plan[TRIAL]}, and {path} is gone",
            f"go back: `springtide rollback --to {version} --reason TEXT`",
        )
    found = checkpoint.restore(Versions(path), int(plan["version"]), trainer, spec)
    base, deltas = live.chain(version)
    old = content.merge(checkpoint.tensors_of(live, part) for part in (base, *deltas))
    mine = checkpoint.full(trainer)
    changes = checkpoint.changes(trainer) | mine | ends(old, mine) | removals(old, mine, carrying_plan(old, mine))
    of = deltas[-1] if deltas else base
    return replace(
        found, version=of.version, kind=of.kind, epoch=of.epoch, parent=of.parent, visible=of.visible
    ), changes


def ends(old: Tensors, mine: Tensors) -> dict[str, Array]:
    """What a delta from `old` to `mine` says of rows and sightings that only `old` has, in tables that both have.

    Args:
        old: A full state.
        mine: Another one.

    >>> ids = np.array([3, 5], np.uint64)
    >>> zeros = {"pending_counts": np.zeros(0, np.int32), "pending_seen_ms": np.zeros(0, np.int64)}
    >>> def of(ids):
    ...     table = {"ids": ids, "rows": np.zeros((len(ids), 2)), "pending_ids": ids[:0], **zeros}
    ...     return {f"user.{name}": column for name, column in table.items()}
    >>> ends(of(ids), of(ids[1:]))["user.removed"].tolist()
    [3]
    """
    found: dict[str, Array] = {}
    both = mine.keys() & old.keys()
    for table in (one for one in tables_in(both) if f"{one}.ids" in both):
        found[f"{table}.removed"] = np.setdiff1d(old[f"{table}.ids"], mine[f"{table}.ids"])
        waits, ours = old[f"{table}.{PENDING[0]}"], mine[f"{table}.{PENDING[0]}"]
        over = np.setdiff1d(waits, ours)
        ended = {PENDING[0]: over, PENDING[1]: np.zeros(len(over), np.int32), PENDING[2]: np.zeros(len(over), np.int64)}
        order = np.argsort(np.concatenate([ours, over]), kind="stable")
        found |= {
            f"{table}.{name}": np.concatenate([mine[f"{table}.{name}"], column])[order]
            for name, column in ended.items()
        }
    return found
