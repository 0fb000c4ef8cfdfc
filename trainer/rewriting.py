"""Takes rows of erased users out of the versions and bases that are kept, whose files are written anew.

A version says how far its trainer had taken erasures into account when it was
made. One of before is rewritten without the users' rows, the oldest first; then
the delta in which they went is, without the ids that say so. Nobody who loads
such a version sees a difference: a trainer forgets the users as it enters, and
answers do not use their rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from state.disk.files import HOST
from state.features.erased import Erased
from state.features.masked_users import MaskedUsers
from state.process.wall_clock import wall_ms
from state.ranking.crosses import Crosses
from state.registry.erasing import ErasureReport, report, reports
from state.registry.manifest import Manifest, entries
from state.registry.registry import SERVING, TRAINING, Registry
from trainer.versions import content
from trainer.versions.erased_rows import CrossedIds, without, without_tombstones

PART = "compactor"
logger = logging.getLogger(__name__)


def reported(registry: Registry) -> ErasureReport:
    """What the compactor last said."""
    said = [one for one in reports(registry.path) if one.part == PART]
    return said[0] if said else ErasureReport(PART, HOST, str(registry.path), 0, 0)


def rewrite(registry: Registry, crosses: Crosses, now_ms: Callable[[], int] = wall_ms) -> int:
    """Takes erased users out of all that is kept; returns how many parts were rewritten.

    Raises:
        CorruptVersion: A file fails its digest.
        UnusableRegistry: The disk refused.
    """
    control = registry.control()
    if control is None or not control.erased:
        return 0
    erased, said, count = control.erased, reported(registry), 0
    parts = [registry.manifest(version, "base") for version in registry.bases()]
    parts += [registry.manifest(version, "delta") for version in registry.deltas()]
    parts.sort(key=lambda part: part.version)
    looked = said.version if said.through >= erased.last else 0
    if any(_theirs(part, erased) for part in parts if part.version > looked):
        # The oldest first: what an id that went stood for is gone when it is left out.
        known = CrossedIds(crosses)
        for part in parts:
            count += _rewritten(registry, part, erased, known)
    last = parts[-1].version if parts else 0
    if (said.through, said.version) != (erased.last, last):
        report(registry.path, replace(said, through=erased.last, pages=erased.last, version=last, at_ms=now_ms()))
    if count:
        logger.info("%d versions and bases written anew without rows of erased users", count)
    return count


def _theirs(part: Manifest, erased: Erased) -> tuple[MaskedUsers, MaskedUsers] | None:
    """The users whose rows a part may have, and those that went in it; None where there are none."""
    rows = erased.after(max(part.erased, part.rewritten)).users
    went = [number for number, offset in part.erasures if offset >= part.log.first and number > part.rewritten]
    ids = erased.after(part.rewritten).up_to(max(went)).users if went and part.kind != "base" else MaskedUsers.NOBODY
    return (rows, ids) if rows or ids else None


def _rewritten(registry: Registry, part: Manifest, erased: Erased, known: CrossedIds) -> bool:
    """Writes a part anew where it has something of erased users."""
    before = content.decode(registry.read(part, name) for name in (SERVING, TRAINING))
    known.see(before)
    theirs = _theirs(part, erased)
    if theirs is None:
        return False
    rows, ids = theirs
    after = without_tombstones(without(before, rows, known), ids, known)
    if all(len(after[name]) == len(tensor) for name, tensor in before.items() if tensor.ndim):
        return False
    files = content.encode(after)
    registry.replace(replace(part, files=entries(files), rewritten=erased.last), files)
    return True
