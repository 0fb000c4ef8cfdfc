"""Makes bases, merges the deltas of old versions, and removes data that is no longer needed: `springtide compact`.

0. Remove rows of erased users from all versions (`rewrite`).
1. If the deltas since the newest base are large, merge base and deltas into another base. It is bit-equal to the state
   of the trainer that published them. The base appears atomically.
2. Versions beyond a certain age are not all kept. Merge the deltas of the others into that of the next kept version
   (`plan`). Loading it gives the same bits. The merged delta appears atomically.
3. Remove the merged parts. Then remove what exceeds its retention time or the limit of bytes, the oldest first.
4. Remove garbage by age (`collect`).
5. Thin snapshots of histories, and remove those from before an erasure (`thin_snapshots`).
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace as changed
from prometheus_client import CollectorRegistry

from state import layout
from state.config.settings import Settings
from state.disk import files as durable
from state.disk.files import HOST
from state.disk.lock import DirectoryLock
from state.errors import CorruptStore, LockHeld, UnusablePlace, UnusableRegistry
from state.features.erased import Erased, MaskedUsers
from state.features.spec import FeatureSpec
from state.file_store import FileStore
from state.history import snapshots
from state.history.snapshots import HistorySnapshot
from state.kernels import Kernels
from state.process import killpoints
from state.process.environment import run_in_background, wall_ms
from state.process.part import run_part
from state.ranking.crosses import Crosses, crosses_of
from state.registry.control import named
from state.registry.directory import usable
from state.registry.hosts import ErasureReport, erasure_reports, write_erasure_report
from state.registry.manifest import Manifest, entries, sees
from state.registry.registry import SERVING, TRAINING, Registry
from state.storage import REGISTRY, kept_bytes, used_bytes
from trainer.versions import content
from trainer.versions.content import CrossedIds, without, without_tombstones

TEMPORARY_MS = 86_400_000


def collect(registry: Registry, keep_ms: int, now_ms: int, in_use: Collection[str] = ()) -> list[str]:
    """Removes garbage older than `keep_ms`; returns the paths, relative to the registry.

    Specs whose digests are `in_use` stay. Files in `tmp/` are kept for a day. The caller holds the compactor's lock.

    Raises:
        CorruptVersion: A manifest or control is damaged: nothing was removed.
        UnusableRegistry: The disk refused.
    """
    with usable("delete unused files"):
        removed = [*_garbage(registry, keep_ms, now_ms, frozenset(in_use)), *_left_by_writers(registry, now_ms)]
        for path in removed:
            # Uses one rename, as for versions, so that a crash leaves no half-deleted folder.
            grave = registry.directory.temporary(f"garbage-{path.name.partition('~')[0]}")
            path.rename(grave)
            shutil.rmtree(grave) if grave.is_dir() else grave.unlink()
    return [path.relative_to(registry.path).as_posix() for path in removed]


def _garbage(registry: Registry, keep_ms: int, now_ms: int, in_use: frozenset[str]) -> list[Path]:
    manifests = [registry.manifest(number) for number in registry.versions()]
    control = registry.control()
    newest_version = max((version.version for version in manifests), default=0)
    epochs = {version.epoch for version in manifests} | ({control.epoch} if control else set())
    garbage: list[Path] = []
    for folder in (layout.VERSIONS, layout.MERGED, layout.BASES):
        if not (registry.path / folder).is_dir():
            continue
        aside = [path for path in _older(registry.path / folder, keep_ms, now_ms) if ".bad" in path.name]
        garbage += [path for path in aside if int(path.name.partition(".")[0].partition("-")[0]) < newest_version]
    # A copy fetches small shared files again if they are missing, so specs and outcomes stay.
    shared = registry.directory.binding is not None
    named_by = {
        layout.PROGRAMS: {version.program for version in manifests},
        layout.SPECS: {version.spec for version in manifests},
    }
    for folder, used in named_by.items():
        if shared and folder == layout.SPECS:
            continue
        every = list((registry.path / folder).iterdir())
        newest = max(every, key=_age_of, default=None)
        old = [path for path in _older(registry.path / folder, keep_ms, now_ms) if path != newest]
        garbage += [path for path in old if path.name.removesuffix(".tflite") not in used | in_use]
    prepared = _older(registry.path / layout.PREPARED, keep_ms, now_ms)
    garbage += [path for path in prepared if not (registry.path / layout.SPECS / path.name).exists()]
    if shared:
        return garbage
    garbage += [
        path
        for path in _older(registry.path / layout.OUTCOMES, keep_ms, now_ms)
        if path.name.split("-")[0].isdecimal() and int(path.name.split("-")[0]) not in epochs
    ]
    return garbage


def _left_by_writers(registry: Registry, now_ms: int) -> list[Path]:
    """Files in `tmp/` of writers that are gone: dead ones of this machine, and others after a day."""
    abandoned = []
    for path in (registry.path / layout.TEMPORARY).iterdir():
        owner = path.name.rpartition("~")[2]
        foreign = owner.count("@") != 2 or not owner.startswith(f"{durable.HOST}@")
        if (foreign and _age_of(path) < now_ms - TEMPORARY_MS) or (not foreign and durable.is_dead(owner)):
            abandoned.append(path)
    return abandoned


def _older(folder: Path, keep_ms: int, now_ms: int) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _age_of(path) < now_ms - keep_ms)


def _age_of(path: Path) -> float:
    """Modification time, ms."""
    return path.stat().st_mtime * 1000


PART = "compactor"
GARBAGE_KEEP_D = 30  # of damaged versions and of files that no kept version refers to
PATIENCE_S, WAIT_S = 300.0, 0.5
LOAD_BYTES = 64_000_000  # of deltas that are read after a base to load a version, if that base is not larger
THIN_EVERY_MS = 600_000  # between versions older than `registry.delta_keep_s`
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
SPARE_BASES, SPARE_SNAPSHOTS = 2, 2
"""The newest bases and snapshots always stay: if one is damaged, the one before it is used."""
SNAPSHOT_MS = 6 * HOUR_MS
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tiers:
    """The retention times of versions.

    Attributes:
        each_ms: How long every durable version is kept.
        thin_ms: How long one version per `thin_every_ms` is kept.
        sparse_ms: How long one version per `sparse_every_ms` is kept.
        thin_every_ms: The distance between versions older than `each_ms`.
        sparse_every_ms: The distance between versions older than `thin_ms`.
        most_bytes: The maximum bytes of all versions together.
        load_bytes: Bytes of deltas that a load may read after its base; more if the base is larger than this.
    """

    each_ms: int
    thin_ms: int
    sparse_ms: int
    thin_every_ms: int = 600_000
    sparse_every_ms: int = HOUR_MS
    most_bytes: int = 1 << 60
    load_bytes: int = LOAD_BYTES


class Merge(NamedTuple):
    """The versions to merge into the last one, oldest first, and the parent of the first one."""

    path: tuple[int, ...]
    parent: int


class Thinning(NamedTuple):
    """A retention plan: deltas to merge, and versions whose deltas and bases are removed."""

    merges: list[Merge]
    deltas: list[int]
    bases: list[int]


def plan(
    deltas: Sequence[Manifest], bases: Sequence[Manifest], keep: Collection[int], tiers: Tiers, now_ms: int
) -> Thinning:
    """Plans what to merge and what to remove, so that all remaining versions can be loaded. Manifests are ascending."""
    parts = _Held(deltas, bases)
    if not parts.all:
        return Thinning([], [], [])
    must = {*keep, max(parts.all)}
    wanted = _young_enough(parts, tiers, now_ms) | must
    expired = {version for version, base in parts.bases.items() if now_ms - base.created_at_ms > tiers.sparse_ms}
    thinning = _thinned(parts, wanted, expired, tiers)
    for base in bases[1:]:
        if parts.bytes_after(thinning) <= tiers.most_bytes:
            break
        # The oldest versions are removed first, with the base that they start from.
        wanted = {version for version in wanted if version >= base.version or version in must}
        thinning = _thinned(parts, wanted, expired, tiers)
    return thinning


class _Held:
    def __init__(self, deltas: Sequence[Manifest], bases: Sequence[Manifest]) -> None:
        self.deltas = {delta.version: delta for delta in deltas}
        self.bases = {base.version: base for base in bases}
        self.all: Mapping[int, Manifest] = self.bases | self.deltas

    def path(self, version: int, stops: Collection[int]) -> tuple[list[int], int | None]:
        """The deltas from `version` back to one of `stops`, newest first, and that stop; None if none is reached."""
        path: list[int] = []
        at: int | None = version
        while at is not None and (at == version or at not in stops):
            if at not in self.deltas:
                return path, None
            path.append(at)
            at = self.deltas[at].parent
        return path, at

    def start(self, version: int, bases: Collection[int]) -> int | None:
        """The one of ascending `bases` that `version` is loaded from."""
        line = self.all[version].visible
        return max((base for base in bases if base <= version and sees(line, base)), default=None)

    def weight(self, versions: Collection[int]) -> int:
        """The total bytes of deltas."""
        return sum(_bytes(self.deltas[version]) for version in versions)

    def bytes_after(self, plan: Thinning) -> int:
        """An upper bound of the bytes of all versions after the plan."""
        merged = {version for merge in plan.merges for version in merge.path}
        removed = set(plan.deltas) - merged
        remaining = [base for version, base in self.bases.items() if version not in plan.bases]
        return self.weight(self.deltas.keys() - removed) + sum(map(_bytes, remaining))


def _young_enough(held: _Held, tiers: Tiers, now_ms: int) -> set[int]:
    """Returns versions to keep because of their age, and those around branch points, where an epoch's branch begins."""
    newest: dict[tuple[int, int, int], int] = {}
    for version, manifest in sorted(held.all.items()):
        for every in (tiers.thin_every_ms, tiers.sparse_every_ms):
            newest[manifest.epoch, every, manifest.created_at_ms // every] = version
    young = set()
    for version, manifest in held.all.items():
        age_ms = now_ms - manifest.created_at_ms
        every = tiers.thin_every_ms if age_ms <= tiers.thin_ms else tiers.sparse_every_ms
        stays = newest[manifest.epoch, every, manifest.created_at_ms // every] == version
        if age_ms <= tiers.each_ms or (stays and age_ms <= tiers.sparse_ms):
            young.add(version)
    for version, delta in held.deltas.items():
        before = None if delta.parent is None else held.all.get(delta.parent)
        if before is not None and before.epoch != delta.epoch and now_ms - delta.created_at_ms <= tiers.sparse_ms:
            young |= {before.version, version}
    return young


def _thinned(held: _Held, wanted: Collection[int], expired: Collection[int], tiers: Tiers) -> Thinning:
    wanted = {version for version in wanted if version in held.all}
    bases = _needed_bases(held, wanted, expired, tiers)
    stops = wanted | bases
    merges: list[Merge] = []
    live: set[int] = set()
    for version in sorted(stops & held.deltas.keys()):
        path, parent = held.path(version, stops)
        if parent is None:
            # The version loads from its own base, or a delta that it needs is missing and it cannot be loaded.
            if version not in bases:
                live.add(version)
            continue
        live.add(version)
        if len(path) > 1:
            merges.append(Merge(tuple(reversed(path)), parent))
    removed = sorted(held.deltas.keys() - live)
    return Thinning(merges, removed, sorted(held.bases.keys() - bases))


def _needed_bases(held: _Held, wanted: Collection[int], expired: Collection[int], tiers: Tiers) -> set[int]:
    """Returns the bases that `wanted` versions load from, except those with an earlier kept base near enough."""
    every = sorted(held.bases)
    starts: dict[int, set[int]] = {}
    for version in wanted:
        if (start := held.start(version, every)) is not None:
            starts.setdefault(start, set()).add(version)
    bases = sorted({*starts, *every[-SPARE_BASES:]})
    for base in bases[1:-SPARE_BASES]:
        without_base = [version for version in bases if version != base]
        before = held.start(base, without_base)
        path, end = held.path(base, {before} if before is not None else ())
        if before is None or before in expired or end != before or base not in held.deltas:
            continue
        most_bytes = max(tiers.load_bytes, _bytes(held.bases[before]))
        beyond = [held.path(version, {base}) for version in starts.get(base, ()) if version != base]
        if all(end == base for _, end in beyond):
            furthest = max((held.weight(path) for path, _ in beyond), default=0)
            if held.weight(path) + furthest <= most_bytes:
                bases = without_base
                starts.setdefault(before, set()).update(starts.pop(base, ()))
    return set(bases)


def reported(registry: Registry) -> ErasureReport:
    """The last report of the compactor."""
    own_reports = [report for report in erasure_reports(registry.path) if report.part == PART]
    return own_reports[0] if own_reports else ErasureReport(PART, HOST, str(registry.path), 0, 0)


def rewrite(registry: Registry, crosses: Crosses, now_ms: Callable[[], int] = wall_ms) -> int:
    """Removes rows of erased users from all versions; returns how many parts were rewritten.

    Raises:
        CorruptVersion: A file fails its digest.
        UnusableRegistry: The disk cannot be written.
    """
    control = registry.control()
    if control is None or not control.erased:
        return 0
    erased, last_report, count = control.erased, reported(registry), 0
    parts = [registry.manifest(version, "base") for version in registry.bases()]
    parts += [registry.manifest(version, "delta") for version in registry.deltas()]
    parts.sort(key=lambda part: part.version)
    checked = last_report.version if last_report.through >= erased.last else 0
    if any(_theirs(part, erased) for part in parts if part.version > checked):
        Kernels(CollectorRegistry(), logger).prepare()
        # Oldest first, so that a row is gone before the delta that removed it loses the row's id.
        crossed_ids = CrossedIds(crosses)
        for part in parts:
            count += _rewritten(registry, part, erased, crossed_ids)
    last = parts[-1].version if parts else 0
    if (last_report.through, last_report.version) != (erased.last, last):
        write_erasure_report(
            registry.path,
            changed(last_report, through=erased.last, pages=erased.last, version=last, at_ms=now_ms()),
        )
    if count:
        logger.info("%d versions and bases rewritten without rows of erased users", count)
    return count


def _theirs(part: Manifest, erased: Erased) -> tuple[MaskedUsers, MaskedUsers] | None:
    """The users whose rows a part may have, and those whose rows it removes; None if there are none."""
    rows = erased.after(max(part.erased, part.rewritten)).users
    own = [number for number, offset in part.erasures if offset >= part.log.first and number > part.rewritten]
    ids = erased.after(part.rewritten).up_to(max(own)).users if own and part.kind != "base" else MaskedUsers.NOBODY
    return (rows, ids) if rows or ids else None


def _rewritten(registry: Registry, part: Manifest, erased: Erased, crossed_ids: CrossedIds) -> bool:
    """Rewrites a part if it has rows or ids of erased users."""
    before = content.decode(registry.read(part, name) for name in (SERVING, TRAINING))
    crossed_ids.see(before)
    users = _theirs(part, erased)
    if users is None:
        return False
    rows, ids = users
    after = without_tombstones(without(before, rows, crossed_ids), ids, crossed_ids)
    if all(len(after[name]) == len(tensor) for name, tensor in before.items() if tensor.ndim):
        return False
    files = content.encode(after)
    registry.replace(replace(part, files=entries(files), rewritten=erased.last), files)
    return True


def tiers_of(settings: Settings) -> Tiers:
    """The tiers of the section `[registry]`, within its share of the disk."""
    retention, of_snapshots = settings.registry, used_bytes([settings.registry_dir / layout.SNAPSHOTS])
    return Tiers(
        each_ms=int(retention.delta_keep_s * 1000),
        thin_ms=DAY_MS,
        sparse_ms=retention.base_keep_d * DAY_MS,
        thin_every_ms=THIN_EVERY_MS,
        sparse_every_ms=HOUR_MS,
        most_bytes=min(int(retention.delta_keep_gb * 1e9), kept_bytes(settings, REGISTRY) - of_snapshots),
    )


def compact(registry: Registry, load_bytes: int = 0) -> Manifest | None:
    """Makes a base of the newest version of control's epoch; None if it is not needed yet.

    It is needed if the deltas since the last base exceed both `load_bytes` and the size of that base.
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
    """Merges and removes versions beyond their tier; returns what was done."""
    # Parts that a crash left next to the delta into which they were merged.
    for version in registry.deltas():
        registry.remove_superseded(version)
    deltas = [registry.manifest(version, "delta") for version in registry.deltas()]
    bases = [registry.manifest(version, "base") for version in registry.bases()]
    control = registry.control()
    thinning = plan(deltas, bases, frozenset() if control is None else named(control), tiers, now_ms)
    passed = {version for merge in thinning.merges for version in merge.path}
    # Expired parts are removed first, the newest first: merging needs disk space, and no part may lack its parent.
    _remove(registry, [version for version in thinning.deltas if version not in passed])
    # A merged delta reaches back beyond these bases; versions that load from them can be loaded without them.
    for version in sorted(thinning.bases, key=lambda version: (version in passed, -version)):
        registry.remove("base", version)
    for merge in thinning.merges:
        parts = [registry.manifest(version, "delta") for version in merge.path]
        files = content.encode(_merged(registry, parts, full=False))
        registry.add_merged(parts, files)
        killpoints.reach("compact.merged")
        registry.remove_superseded(merge.path[-1])
    _remove(registry, [version for version in thinning.deltas if version in passed])
    return thinning


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


def thin_snapshots(location: FileStore, erased: int, most_bytes: int, now_ms: int) -> list[int]:
    """Removes old snapshots of histories, and those from before the erasure `erased`; returns their numbers.

    Of each set of shares the newest `SPARE_SNAPSHOTS` are kept, and of the last day the newest of each six hours. If
    the remaining snapshots exceed `most_bytes`, the oldest are removed.

    Raises:
        UnusablePlace: The location cannot be reached.
    """
    kept, removed = list[HistorySnapshot](), list[int]()
    for number in snapshots.numbers(location):
        try:
            kept.append(snapshots.read(location, number))
        except CorruptStore as error:
            logger.error("%s; it is removed", error)
            removed.append(number)
    removed += [snapshot.number for snapshot in kept if snapshot.erased < erased]
    kept = [snapshot for snapshot in kept if snapshot.erased >= erased]
    young = [snapshot for snapshot in kept if now_ms - snapshot.created_at_ms <= DAY_MS]
    sparse = {(snapshot.held, snapshot.created_at_ms // SNAPSHOT_MS): snapshot.number for snapshot in young}
    stay = {*sparse.values()}
    for held in {snapshot.held for snapshot in kept}:
        stay |= {
            snapshot.number for snapshot in [snapshot for snapshot in kept if snapshot.held == held][-SPARE_SNAPSHOTS:]
        }
    wanted = [snapshot for snapshot in kept if snapshot.number in stay]
    while len(wanted) > 1 and _snapshot_bytes(wanted) > most_bytes:
        # Snapshots share files with later ones, so sizes are computed for the remaining set.
        wanted = wanted[1:]
    stay = {snapshot.number for snapshot in wanted}
    removed += [snapshot.number for snapshot in kept if snapshot.number not in stay]
    snapshots.remove(location, removed, now_ms)
    return removed


def _snapshot_bytes(manifests: Sequence[HistorySnapshot]) -> int:
    return sum({file.name: file.bytes for snapshot in manifests for file in snapshot.files}.values())


def run(settings: Settings, clock: Callable[[], float] = time.time) -> None:
    """Compacts and removes once.

    Raises:
        LockHeld: Another compactor works on this registry.
        SpringtideError: The registry cannot be read.
    """
    with DirectoryLock(settings.registry_dir, layout.COMPACTOR_LOCK):
        registry = Registry(settings.registry_dir)
        control, now_ms = registry.control(), int(clock() * 1000)
        try:
            # Snapshots are removed before versions, because versions get the space that snapshots leave.
            erased = 0 if control is None else control.erased.last
            location = snapshots.location_of(settings)
            if removed := thin_snapshots(location, erased, snapshots.most_bytes(settings), now_ms):
                logger.info("removed %d snapshots of histories", len(removed))
        except UnusablePlace as error:
            logger.warning("%s; snapshots of histories are thinned later", error)
        tiers = tiers_of(settings)
        began = time.monotonic()
        try:
            rewrite(registry, crosses_of(settings))
            base = compact(registry, tiers.load_bytes)
        except UnusableRegistry:
            # On a full disk, parts beyond their tiers are still removed.
            thin(registry, tiers, now_ms)
            raise
        if base is not None:
            logger.info(
                "base of version %d: %.1f MB in %.1f s", base.version, _bytes(base) / 1e6, time.monotonic() - began
            )
        merges, deltas, removed_bases = thin(registry, tiers, now_ms)
        if merges or deltas or removed_bases:
            logger.info(
                "merged %d deltas into %d, removed %d deltas and %d bases",
                *(sum(len(merge.path) for merge in merges), len(merges), len(deltas), len(removed_bases)),
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
        except LockHeld as error:
            if time.monotonic() > until_s:
                raise
            logger.info("%s: waiting for it", error.what)
            time.sleep(WAIT_S)


def main(argv: Sequence[str] | None = None) -> int:
    """Compacts once; returns the exit code."""
    run_in_background()
    return run_part("compactor", run_after_others, argv, logger)


if __name__ == "__main__":
    sys.exit(main())
