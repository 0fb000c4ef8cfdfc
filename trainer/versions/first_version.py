"""What a trainer has at the beginning of an epoch, and what the epoch's first version holds.

An epoch goes on from its base bit for bit; or an upgrade carries the base over
into another model; or there is nothing to go on from.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from state.registry.control import Control
from state.registry.manifest import Manifest
from state.registry.registry import Registry
from state.registry.restoring import without_lost_log
from state.registry.upgrades import pending
from state.registry.versions import Versions
from trainer.engine.step import Trainer
from trainer.versions import checkpoint, content
from trainer.versions.carrying import Carrying, carried, plan, removals
from trainer.versions.promoted import TRIAL, take_over

logger = logging.getLogger(__name__)


class CarriedOver(NamedTuple):
    """A version that a trainer of another model goes on from.

    Attributes:
        manifest: Of that version.
        planned: What goes on and what does not.
        changes: What the first version says beside what goes on, as `content.encode` takes it.
    """

    manifest: Manifest
    planned: Carrying
    changes: dict[str, content.Array]


def carry_over(versions: Versions, version: int, trainer: Trainer) -> CarriedOver:
    """Makes `trainer` one that has of `version` what fits it; the rest is as before learning.

    Args:
        versions: Where the version is.
        version: Its number.
        trainer: Is cleared first.

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
    # Rows that go on are the base's: the version need not hold them again.
    changes = checkpoint.changes(trainer) | removals(old, fresh, planned)
    return CarriedOver(deltas[-1] if deltas else base, planned, changes)


def restore_or_carry(
    registry: Registry, control: Control, version: int, trainer: Trainer, spec: str
) -> tuple[Manifest, dict[str, content.Array] | None]:
    """Makes `trainer` the one that published `version`, or that goes on from it where an upgrade begins.

    Returns:
        The manifest of the version, and what the first version of an upgrade holds; None where there is none.

    Raises:
        UnknownVersion, CorruptVersion: The version cannot be read.
        SpecMismatch, SettingsError: It is of other features or another model, and nobody asked for an upgrade.
    """
    began = pending(registry, control)
    if began is not None and began.plan is not None and TRIAL in began.plan:
        logger.info("epoch %d goes on from trial %s", control.epoch, began.plan[TRIAL])
        return take_over(registry, began.plan, version, trainer, spec)
    if began is None:
        return without_lost_log(registry, control, checkpoint.restore(registry, version, trainer, spec)), None
    found = carry_over(registry, version, trainer)
    logger.info("epoch %d goes on from version %d: %s", control.epoch, version, "; ".join(found.planned.lines()))
    return found.manifest, found.changes


def nothing_learned(trainer: Trainer, about: Mapping[str, Any]) -> dict[str, content.Array]:
    """Makes `trainer` one that has learned nothing; returns what the first base holds.

    Args:
        trainer: Is cleared first.
        about: What the bootstrap wrote about the feature spec.
    """
    checkpoint.begin(trainer, about)
    return checkpoint.full(trainer)
