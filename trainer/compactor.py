"""Makes bases, merges the deltas of old versions, and removes data that is no longer needed: `springtide compact`.

0. Rows of erased users are removed from all that is kept (`rewrite`).
1. If much is read beyond the newest base, it and the deltas since are merged into another base. It is bit-equal to
   the state of the trainer that published them. This needs no TensorFlow and no pause of the trainer. The base appears
   at once.
2. Deltas of versions that are too old to be kept each are merged into that of the next kept one
   (`trainer/thinning.py`). The rest is loaded with the same bits. The merged delta appears at once.
3. The merged parts are removed. Then whatever exceeds its time or the bytes is removed, the oldest first.
4. Garbage is removed by age (`state/registry/garbage.py`).

Versions that control names are never removed. A crash at any step leaves all kept versions loadable, and the rest of
the work for the next run.

For step 0, a version records how far its trainer had applied erasures when it was made. Earlier versions are rewritten
without the users' rows, the oldest first. Then the delta that removed those rows is rewritten without the ids of the
removed rows. Loading such a version gives the same result: a trainer forgets the users as it enters the epoch, and
serving does not use their rows.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from msgspec.structs import replace as changed

from state import layout
from state.config.settings import Settings
from state.disk.files import HOST
from state.disk.lock import DirectoryLock
from state.errors import LockHeld, UnusableRegistry
from state.features.erased import Erased
from state.features.masked_users import MaskedUsers
from state.features.spec import FeatureSpec
from state.process import killpoints
from state.process.part import run_part
from state.process.wall_clock import wall_ms
from state.ranking.crosses import Crosses, crosses_of
from state.registry.control import Control, named
from state.registry.erasing import ErasureReport, report, reports
from state.registry.garbage import collect
from state.registry.manifest import Manifest, entries
from state.registry.registry import SERVING, TRAINING, Registry
from state.storage.shares import REGISTRY, kept_bytes
from trainer.thinning import DAY_MS, HOUR_MS, Thinning, Tiers, plan
from trainer.versions import content
from trainer.versions.erased_rows import CrossedIds, without, without_tombstones

PART = "compactor"
NICENESS = 10
GARBAGE_KEEP_D = 30  # of damaged versions and of files that no kept version refers to
PATIENCE_S, WAIT_S = 300.0, 0.5
THIN_EVERY_MS = 600_000  # between versions older than `registry.delta_keep_s`
logger = logging.getLogger(__name__)


def reported(registry: Registry) -> ErasureReport:
    """The last report of the compactor."""
    said = [one for one in reports(registry.path) if one.part == PART]
    return said[0] if said else ErasureReport(PART, HOST, str(registry.path), 0, 0)


def rewrite(registry: Registry, crosses: Crosses, now_ms: Callable[[], int] = wall_ms) -> int:
    """Removes rows of erased users from all that is kept; returns how many parts were rewritten.

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
        # The oldest first: when the id of a removed row is left out, the row itself is gone already.
        known = CrossedIds(crosses)
        for part in parts:
            count += _rewritten(registry, part, erased, known)
    last = parts[-1].version if parts else 0
    if (said.through, said.version) != (erased.last, last):
        report(registry.path, changed(said, through=erased.last, pages=erased.last, version=last, at_ms=now_ms()))
    if count:
        logger.info("%d versions and bases written anew without rows of erased users", count)
    return count


def _theirs(part: Manifest, erased: Erased) -> tuple[MaskedUsers, MaskedUsers] | None:
    """The users whose rows a part may have, and those whose rows it removes; None if there are none."""
    rows = erased.after(max(part.erased, part.rewritten)).users
    went = [number for number, offset in part.erasures if offset >= part.log.first and number > part.rewritten]
    ids = erased.after(part.rewritten).up_to(max(went)).users if went and part.kind != "base" else MaskedUsers.NOBODY
    return (rows, ids) if rows or ids else None


def _rewritten(registry: Registry, part: Manifest, erased: Erased, known: CrossedIds) -> bool:
    """Rewrites a part if it has rows or ids of erased users."""
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


def tiers_of(settings: Settings) -> Tiers:
    """The tiers of the section `[registry]`, within its share of the disk."""
    kept = settings.registry
    return Tiers(
        each_ms=int(kept.delta_keep_s * 1000),
        thin_ms=kept.base_keep_h * HOUR_MS,
        sparse_ms=kept.base_keep_d * DAY_MS,
        thin_every_ms=THIN_EVERY_MS,
        sparse_every_ms=HOUR_MS,
        most_bytes=min(int(kept.delta_keep_gb * 1e9), kept_bytes(settings, REGISTRY)),
        load_bytes=int(kept.load_mb * 1e6),
    )


def needed(control: Control | None) -> frozenset[int]:
    """The versions that control names: they stay whatever their age."""
    return frozenset() if control is None else named(control)


def compact(registry: Registry, load_bytes: int = 0) -> Manifest | None:
    """Makes a base of the newest version of control's epoch; None if there is nothing new, or little to read.

    Args:
        registry: With the compactor's lock held.
        load_bytes: A base is made only if the deltas beyond the last one exceed this, and that base's own size.

    Raises:
        CorruptVersion: A file of its chain fails its digest.
    """
    control = registry.control()
    version = registry.newest(control.epoch) if control else None
    if version is None or version in registry.bases():
        return None
    base, deltas = registry.chain(version)
    if load_bytes and sum(map(_bytes, deltas)) <= max(load_bytes, _bytes(base)):
        return None
    return registry.add_base(deltas[-1], content.encode(_merged(registry, [base, *deltas], full=True)))


def thin(registry: Registry, tiers: Tiers, now_ms: int) -> Thinning:
    """Merges and removes what is beyond its tier; returns what was done.

    Raises:
        CorruptVersion: A file that is to be merged fails its digest.
    """
    # Parts that a crash left next to the delta into which they were merged.
    for version in registry.deltas():
        registry.remove_superseded(version)
    deltas = [registry.manifest(version, "delta") for version in registry.deltas()]
    bases = [registry.manifest(version, "base") for version in registry.bases()]
    found = plan(deltas, bases, needed(registry.control()), tiers, now_ms)
    passed = {version for merge in found.merges for version in merge.path}
    # Expired parts are removed first, the newest first: merging needs disk space, and no part may lack its parent.
    _remove(registry, [one for one in found.deltas if one not in passed])
    # A merged delta reaches back beyond these bases; versions that load from them can be loaded without them.
    for version in sorted(found.bases, key=lambda one: (one in passed, -one)):
        registry.remove("base", version)
    for merge in found.merges:
        parts = [registry.manifest(version, "delta") for version in merge.path]
        files = content.encode(_merged(registry, parts, full=False))
        registry.add_merged(parts, files)
        killpoints.reach("compact.merged")
        registry.remove_superseded(merge.path[-1])
    _remove(registry, [one for one in found.deltas if one in passed])
    return found


def _remove(registry: Registry, versions: Sequence[int]) -> None:
    for version in reversed(versions):
        registry.remove_delta(version)
        killpoints.reach("compact.removed")


def _merged(registry: Registry, parts: Sequence[Manifest], full: bool) -> dict[str, content.Array]:
    return content.merge(
        (content.decode(registry.read(part, name) for name in (SERVING, TRAINING)) for part in parts), full
    )


def _bytes(part: Manifest) -> int:
    return sum(entry.bytes for entry in part.files.values())


def run(settings: Settings, clock: Callable[[], float] = time.time) -> None:
    """Compacts and removes once.

    Raises:
        LockHeld: Another compactor works on this registry.
        SpringtideError: The registry cannot be read.
    """
    with DirectoryLock(settings.registry_dir, layout.COMPACTOR_LOCK):
        registry = Registry(settings.registry_dir)
        tiers, now_ms = tiers_of(settings), int(clock() * 1000)
        began = time.monotonic()
        try:
            rewrite(registry, crosses_of(settings))
            made = compact(registry, tiers.load_bytes)
        except UnusableRegistry:
            # On a full disk, parts beyond their tiers are still removed.
            thin(registry, tiers, now_ms)
            raise
        if made is not None:
            logger.info(
                "base of version %d: %.1f MB in %.1f s", made.version, _bytes(made) / 1e6, time.monotonic() - began
            )
        done = thin(registry, tiers, now_ms)
        if any(done):
            logger.info(
                "merged %d deltas into %d, removed %d deltas and %d bases",
                *(sum(len(merge.path) for merge in done.merges), len(done.merges), len(done.deltas), len(done.bases)),
            )
        keep_ms, spec = GARBAGE_KEEP_D * DAY_MS, FeatureSpec.from_settings(settings).digest
        for name in collect(registry, keep_ms, now_ms, [spec]):
            logger.info("removed %s, which nothing needs any more", name)


def run_after_others(settings: Settings) -> None:
    """Like `run`, after a running compactor has ended; the trainer starts one from time to time.

    Raises:
        LockHeld: It is not done within `PATIENCE_S`.
        SpringtideError: The registry cannot be read.
    """
    until_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            return run(settings)
        except LockHeld as held:
            if time.monotonic() > until_s:
                raise
            logger.info("%s: waiting for it", held.what)
            time.sleep(WAIT_S)


def main(argv: Sequence[str] | None = None) -> int:
    """Compacts once; returns the exit code."""
    os.nice(NICENESS)
    return run_part("compactor", run_after_others, argv, logger)


if __name__ == "__main__":
    sys.exit(main())
