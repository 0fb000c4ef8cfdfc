"""Makes a base of the newest version, and removes what no one needs any more: `springtide compact`.

0. Rows of erased users are taken out of all that is kept (`trainer/rewriting.py`).
1. The newest base and the deltas after it are merged: bit-equal to the state
   of the trainer that published them. No TensorFlow, no pause of the trainer.
2. `bases/<version>/` appears at once.
3. Deltas and bases that are older than their tier are removed, oldest first.
4. Garbage goes by age (`state/registry/garbage.py`).

A delta is some 1.5 MB with the default network (weights and two slots of each),
at five versions a second 7 MB/s. So deltas are kept for `registry.delta_keep_s`
or `registry.delta_keep_gb`, whichever is less, and on back to the base that the
oldest of them starts from; bases for an hour all, for `base_keep_h` one an hour, for
`base_keep_d` days one a day. What control names is never removed.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from state import layout
from state.config.loading import load
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import LockHeld, SpringtideError, UnusableRegistry, of_disk
from state.features.spec import FeatureSpec
from state.process.private_files import keep_private
from state.registry.control import Control
from state.registry.garbage import collect
from state.registry.manifest import Kind, Manifest
from state.registry.registry import SERVING, TRAINING, Registry
from state.storage.shares import REGISTRY, kept_bytes
from trainer.rewriting import crosses_of, rewrite
from trainer.versions import content

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
NICENESS = 10
PATIENCE_S, WAIT_S = 300.0, 0.5
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tiers:
    """How long what is kept.

    Attributes:
        delta_ms: Each delta.
        delta_bytes: All deltas together.
        hourly_ms: One base an hour; every base for one hour.
        daily_ms: One base a day.
    """

    delta_ms: int
    delta_bytes: int
    hourly_ms: int
    daily_ms: int

    @classmethod
    def of(cls, settings: Settings) -> Tiers:
        """The tiers of the section `[registry]`."""
        kept = settings.registry
        return cls(
            delta_ms=int(kept.delta_keep_s * 1000),
            delta_bytes=min(int(kept.delta_keep_gb * 1e9), kept_bytes(settings, REGISTRY)),
            hourly_ms=kept.base_keep_h * HOUR_MS,
            daily_ms=kept.base_keep_d * DAY_MS,
        )


def needed(control: Control | None) -> frozenset[int]:
    """The versions that control names: they stay whatever their age."""
    if control is None:
        return frozenset()
    return frozenset(version for version in (control.base, control.serving.version) if version is not None)


def old_bases(bases: Sequence[Manifest], keep: Collection[int], tiers: Tiers, now_ms: int) -> list[int]:
    """The bases to remove: of each hour, later of each day, the newest stays. Pure.

    Args:
        bases: Ascending.
        keep: Versions that stay.
        tiers: How long what is kept.
        now_ms: Wall clock.
    """
    removed = []
    for base, following in pairwise(bases):
        age_ms = now_ms - base.created_at_ms
        if age_ms <= HOUR_MS or base.version in keep:
            continue
        tier_ms = HOUR_MS if age_ms <= tiers.hourly_ms else DAY_MS if age_ms <= tiers.daily_ms else 0
        if tier_ms == 0 or base.created_at_ms // tier_ms == following.created_at_ms // tier_ms:
            removed.append(base.version)
    return removed


def old_deltas(
    deltas: Sequence[Manifest], bases: Collection[int], keep: Collection[int], tiers: Tiers, now_ms: int
) -> tuple[list[int], frozenset[int]]:
    """The deltas to remove, oldest first, and the versions whose base those that stay start from. Pure.

    A delta goes when it is too old, or beyond the bytes, and no version that
    stays is made from it: whatever is listed can be restored.

    Args:
        deltas: Ascending.
        bases: The versions that have a base.
        keep: Versions that stay; the newest stays too.
        tiers: How long what is kept.
        now_ms: Wall clock.
    """
    made_from = {*keep, *(delta.version for delta in deltas[-1:])}
    removed: list[int] = []
    bytes_after = 0
    for delta in reversed(deltas):
        bytes_after += sum(entry.bytes for entry in delta.files.values())
        young = bytes_after <= tiers.delta_bytes and now_ms - delta.created_at_ms <= tiers.delta_ms
        based = delta.version in bases
        if not young and (based or delta.version not in made_from):
            removed.append(delta.version)
        elif delta.parent is not None:
            made_from.add(delta.version if based else delta.parent)
    return removed[::-1], frozenset(made_from.intersection(bases))


def compact(registry: Registry) -> Manifest | None:
    """Makes a base of the newest version of control's epoch; None where there is nothing new.

    Raises:
        CorruptVersion: A file of its chain fails its digest.
    """
    control = registry.control()
    version = registry.newest(control.epoch) if control else None
    if version is None or version in registry.bases():
        return None
    # 1.
    base, deltas = registry.chain(version)
    merged = content.merge(
        content.decode(registry.read(part, name) for name in (SERVING, TRAINING)) for part in (base, *deltas)
    )
    # 2.
    return registry.add_base(deltas[-1], content.encode(merged))


def retain(registry: Registry, tiers: Tiers, now_ms: int) -> dict[Kind, list[int]]:
    """Removes what is beyond its tier; returns what went."""
    keep = needed(registry.control())
    deltas = [registry.manifest(version, "delta") for version in registry.deltas()]
    bases = [registry.manifest(version, "base") for version in registry.bases()]
    gone_deltas, starts = old_deltas(deltas, {base.version for base in bases}, keep, tiers, now_ms)
    gone: dict[Kind, list[int]] = {"delta": gone_deltas, "base": old_bases(bases, keep | starts, tiers, now_ms)}
    # Deltas first: a crash between leaves bases too many, never a delta without its base.
    for version in gone["delta"]:
        registry.remove("delta", version)
    for version in gone["base"]:
        registry.remove("base", version)
    return gone


def run(settings: Settings, clock: Callable[[], float] = time.time) -> None:
    """Compacts and removes once.

    Raises:
        LockHeld: Another compactor works on this registry.
        SpringtideError: The registry cannot be read.
    """
    with DirectoryLock(settings.registry_dir, layout.COMPACTOR_LOCK):
        registry = Registry(settings.registry_dir)
        began = time.monotonic()
        try:
            rewrite(registry, crosses_of(settings))
            made = compact(registry)
        except UnusableRegistry:
            # A full disk is the best reason to remove what is beyond its tier.
            retain(registry, Tiers.of(settings), int(clock() * 1000))
            raise
        if made is not None:
            size = sum(entry.bytes for entry in made.files.values())
            logger.info("base of version %d: %.1f MB in %.1f s", made.version, size / 1e6, time.monotonic() - began)
        gone = retain(registry, Tiers.of(settings), int(clock() * 1000))
        if any(gone.values()):
            logger.info("removed %d deltas and %d bases beyond their retention", len(gone["delta"]), len(gone["base"]))
        keep_ms, spec = settings.registry.garbage_keep_d * DAY_MS, FeatureSpec.from_settings(settings).digest
        for name in collect(registry, keep_ms, int(clock() * 1000), [spec]):
            logger.info("removed %s, which nothing needs any more", name)


def run_after_others(settings: Settings) -> None:
    """As `run`, once another compactor is done: the trainer starts one now and then.

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
    keep_private()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s compactor %(levelname)s %(message)s", stream=sys.stderr)
    os.nice(NICENESS)
    try:
        run_after_others(load(sys.argv[1:] if argv is None else argv, os.environ))
    except (SpringtideError, OSError) as problem:
        error = of_disk(problem)
        logger.error("%s: %s", type(error).__name__, error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
