"""Prepares a trainer for the beginning of an epoch, and builds what the epoch's first version holds.

An epoch continues from its base bit for bit, or an upgrade carries the base over into another model, or the trainer
starts from scratch. To promote an experiment, the live trainer takes over the state of the experiment's trainer. The
epoch's first version is then a delta of the live version that the epoch begins from, so readers of versions need no
knowledge of experiments.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from state import layout
from state.errors import UnknownVersion
from state.registry.control import RESTORE, Control
from state.registry.manifest import LogRange, Manifest
from state.registry.registry import Registry
from state.registry.upgrades import pending
from state.rows.tables import tables_in
from trainer.engine.step import Trainer
from trainer.versions import checkpoint, content
from trainer.versions.carrying import Carrying, carried, plan, removals
from trainer.versions.carrying import plan as carrying_plan
from trainer.versions.content import PENDING, Array, Tensors

EXPERIMENT = "experiment"
"""Key in the plan of a control generation: the name of the experiment that the epoch continues from."""

logger = logging.getLogger(__name__)


def take_over(
    live: Registry, plan: Mapping[str, Any], version: int, trainer: Trainer, spec: str
) -> tuple[Manifest, dict[str, Array]]:
    """Restores `trainer` to the experiment's version, as the start of an epoch that begins from the live `version`.

    Args:
        live: The live registry.
        plan: The plan of the generation that began the epoch.
        version: The live version that the epoch begins from.
        trainer: Is cleared first.
        spec: Digest of its feature spec.

    Returns:
        The experiment's manifest with the identity of the live version, and what the epoch's first version holds.

    Raises:
        UnknownVersion: The experiment's registry is gone, or a version of it.
        CorruptVersion: A file fails its digest.
    """
    path = layout.experiment_registry(trainer.settings.state_dir, str(plan[EXPERIMENT]))
    if not path.is_dir():
        raise UnknownVersion(
            f"the epoch continues from experiment {plan[EXPERIMENT]}, and {path} is gone",
            f"roll back: `springtide rollback --to {version} --reason TEXT`",
        )
    found = checkpoint.restore(Registry(path), int(plan["version"]), trainer, spec)
    base, deltas = live.chain(version)
    old = content.merge(checkpoint.tensors_of(live, part) for part in (base, *deltas))
    mine = checkpoint.full(trainer)
    changes = checkpoint.changes(trainer) | mine | ends(old, mine) | removals(old, mine, carrying_plan(old, mine))
    of = deltas[-1] if deltas else base
    return replace(
        found, version=of.version, kind=of.kind, epoch=of.epoch, parent=of.parent, visible=of.visible
    ), changes


def ends(old: Tensors, mine: Tensors) -> dict[str, Array]:
    """The removals in a delta from `old` to `mine`: rows and sightings that only `old` has, in tables that both have.

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


class CarriedOver(NamedTuple):
    """A version that a trainer of another model continues from.

    Attributes:
        manifest: Its manifest.
        planned: Which parts are carried over and which are not.
        changes: The content of the first version besides the carried parts, as `content.encode` takes it.
    """

    manifest: Manifest
    planned: Carrying
    changes: dict[str, content.Array]


def carry_over(versions: Registry, version: int, trainer: Trainer) -> CarriedOver:
    """Loads the fitting parts of `version` into `trainer`; the rest is initialised.

    Raises:
        UnknownVersion: A part of its chain is not kept.
        CorruptVersion: A file of its chain fails its digest.
    """
    base, deltas = versions.chain(version)
    old = content.merge(checkpoint.tensors_of(versions, part) for part in (base, *deltas))
    trainer.clear()
    fresh = checkpoint.full(trainer)
    planned = plan(old, fresh)
    checkpoint.load(trainer, carried(old, fresh, planned, trainer.model.fast_weights))
    # Carried rows are the base's: the version need not repeat them.
    changes = checkpoint.changes(trainer) | removals(old, fresh, planned)
    return CarriedOver(deltas[-1] if deltas else base, planned, changes)


def restore_or_carry(
    registry: Registry, control: Control, version: int, trainer: Trainer, spec: str
) -> tuple[Manifest, dict[str, content.Array] | None]:
    """Restores the trainer that published `version`, or carries it over if an upgrade begins.

    Returns:
        The manifest of the version, and what the first version of an upgrade holds; None without an upgrade.

    Raises:
        UnknownVersion, CorruptVersion: The version cannot be read.
        SpecMismatch, SettingsError: It has other features or another model, and no upgrade was requested.
    """
    began = pending(registry, control)
    if began is not None and began.plan is not None and EXPERIMENT in began.plan:
        logger.info("epoch %d continues from experiment %s", control.epoch, began.plan[EXPERIMENT])
        return take_over(registry, began.plan, version, trainer, spec)
    if began is None:
        return _without_lost_log(registry, control, checkpoint.restore(registry, version, trainer, spec)), None
    found = carry_over(registry, version, trainer)
    logger.info("epoch %d goes on from version %d: %s", control.epoch, version, "; ".join(found.planned.lines()))
    return found.manifest, found.changes


def _without_lost_log(registry: Registry, control: Control, version: Manifest) -> Manifest:
    """A version as control's epoch continues from it. If its log was lost, it has no log position and counts the loss."""
    began = registry.generations.beginning_of(control.epoch)
    if began is None or began.action != RESTORE or began.plan is None or version.epoch == control.epoch:
        return version
    gap = version.metrics.get("account.gap", 0.0) + int(began.plan["lost"])
    log = LogRange(version.log.topic, partition=version.log.partition)
    return replace(version, log=log, metrics={**version.metrics, "account.gap": gap})


def nothing_learned(trainer: Trainer, about: Mapping[str, Any]) -> dict[str, content.Array]:
    """Clears everything that `trainer` has learned; returns what the first base holds."""
    checkpoint.begin(trainer, about)
    return checkpoint.full(trainer)
