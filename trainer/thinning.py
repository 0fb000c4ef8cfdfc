"""Plans the retention of versions: which stay, which deltas are merged, and which bases are needed. Pure functions.

Every version stays while it is young. Later the newest of each ten minutes stays,
then the newest of each hour. The deltas in between are merged into the delta of the
next version that stays; loading it gives the same bits. A base is removed if the
previous base and the deltas since then also load quickly.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from state.registry.manifest import Manifest, sees

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
SPARE_BASES = 2
"""The newest bases always stay: if one is damaged, the one before it is used."""


@dataclass(frozen=True, slots=True)
class Tiers:
    """The retention times of versions.

    Attributes:
        each_ms: Every durable version is kept this long.
        thin_ms: One version in `thin_every_ms` is kept this long.
        sparse_ms: One version in `sparse_every_ms` is kept this long.
        thin_every_ms: The distance of versions older than `each_ms`.
        sparse_every_ms: The distance of versions older than `thin_ms`.
        most_bytes: The most bytes of all versions together.
        load_bytes: Bytes of deltas that a load may read after its base; more if the base is larger than this.
    """

    each_ms: int
    thin_ms: int
    sparse_ms: int
    thin_every_ms: int = 600_000
    sparse_every_ms: int = HOUR_MS
    most_bytes: int = 1 << 60
    load_bytes: int = 64_000_000


class Merge(NamedTuple):
    """Deltas to merge into one.

    Attributes:
        path: The versions, oldest first; the last one stays.
        parent: The version that the first one continues.
    """

    path: tuple[int, ...]
    parent: int


class Thinning(NamedTuple):
    """A retention plan, in the order in which to apply it.

    Attributes:
        merges: Deltas to merge.
        deltas: Versions whose deltas are removed.
        bases: Versions whose bases are removed.
    """

    merges: list[Merge]
    deltas: list[int]
    bases: list[int]


def plan(
    deltas: Sequence[Manifest], bases: Sequence[Manifest], keep: Collection[int], tiers: Tiers, now_ms: int
) -> Thinning:
    """Plans what to merge and what to remove, so that all remaining versions can be loaded.

    Args:
        deltas: Manifests of the deltas, ascending.
        bases: Manifests of the bases, ascending.
        keep: Versions that stay whatever their age.
        tiers: The retention times.
        now_ms: Wall clock.
    """
    held = _Held(deltas, bases)
    if not held.all:
        return Thinning([], [], [])
    must = {*keep, max(held.all)}
    wanted = _young_enough(held, tiers, now_ms) | must
    expired = {version for version, one in held.bases.items() if now_ms - one.created_at_ms > tiers.sparse_ms}
    found = _thinned(held, wanted, expired, tiers)
    for base in bases[1:]:
        if held.bytes_after(found) <= tiers.most_bytes:
            break
        # The oldest versions are removed first, with the base that they start from.
        wanted = {version for version in wanted if version >= base.version or version in must}
        found = _thinned(held, wanted, expired, tiers)
    return found


class _Held:
    """The existing versions."""

    def __init__(self, deltas: Sequence[Manifest], bases: Sequence[Manifest]) -> None:
        self.deltas = {one.version: one for one in deltas}
        self.bases = {one.version: one for one in bases}
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
        return max((one for one in bases if one <= version and sees(line, one)), default=None)

    def weight(self, versions: Collection[int]) -> int:
        """The total bytes of deltas."""
        return sum(_bytes(self.deltas[version]) for version in versions)

    def bytes_after(self, plan: Thinning) -> int:
        """An upper bound of the bytes of all versions after the plan."""
        merged = {version for merge in plan.merges for version in merge.path}
        gone = set(plan.deltas) - merged
        kept = [one for version, one in self.bases.items() if version not in plan.bases]
        return self.weight(self.deltas.keys() - gone) + sum(map(_bytes, kept))


def _young_enough(held: _Held, tiers: Tiers, now_ms: int) -> set[int]:
    """Versions that stay by their age, and those around branch points: each epoch has its own branch of the log."""
    newest: dict[tuple[int, int, int], int] = {}
    for version, one in sorted(held.all.items()):
        for every in (tiers.thin_every_ms, tiers.sparse_every_ms):
            newest[one.epoch, every, one.created_at_ms // every] = version
    found = set()
    for version, one in held.all.items():
        age_ms = now_ms - one.created_at_ms
        every = tiers.thin_every_ms if age_ms <= tiers.thin_ms else tiers.sparse_every_ms
        stays = newest[one.epoch, every, one.created_at_ms // every] == version
        if age_ms <= tiers.each_ms or (stays and age_ms <= tiers.sparse_ms):
            found.add(version)
    for version, one in held.deltas.items():
        before = None if one.parent is None else held.all.get(one.parent)
        if before is not None and before.epoch != one.epoch and now_ms - one.created_at_ms <= tiers.sparse_ms:
            found |= {before.version, version}
    return found


def _thinned(held: _Held, wanted: Collection[int], expired: Collection[int], tiers: Tiers) -> Thinning:
    wanted = {version for version in wanted if version in held.all}
    kept = _needed_bases(held, wanted, expired, tiers)
    stops = wanted | kept
    merges: list[Merge] = []
    live: set[int] = set()
    for version in sorted(stops & held.deltas.keys()):
        path, parent = held.path(version, stops)
        if parent is None:
            # It is loaded from its own base; or a delta that it needs is missing, and it is no target to load.
            if version not in kept:
                live.add(version)
            continue
        live.add(version)
        if len(path) > 1:
            merges.append(Merge(tuple(reversed(path)), parent))
    gone = sorted(held.deltas.keys() - live)
    return Thinning(merges, gone, sorted(held.bases.keys() - kept))


def _needed_bases(held: _Held, wanted: Collection[int], expired: Collection[int], tiers: Tiers) -> set[int]:
    """The bases that `wanted` versions start from, without those for which an earlier, lasting base is near enough."""
    every = sorted(held.bases)
    starts: dict[int, set[int]] = {}
    for version in wanted:
        if (start := held.start(version, every)) is not None:
            starts.setdefault(start, set()).add(version)
    kept = sorted({*starts, *every[-SPARE_BASES:]})
    for base in kept[1:-SPARE_BASES]:
        others = [one for one in kept if one != base]
        before = held.start(base, others)
        path, end = held.path(base, {before} if before is not None else ())
        if before is None or before in expired or end != before or base not in held.deltas:
            continue
        most = max(tiers.load_bytes, _bytes(held.bases[before]))
        beyond = [held.path(version, {base}) for version in starts.get(base, ()) if version != base]
        if all(end == base for _, end in beyond):
            furthest = max((held.weight(one) for one, _ in beyond), default=0)
            if held.weight(path) + furthest <= most:
                kept = others
                starts.setdefault(before, set()).update(starts.pop(base, ()))
    return set(kept)


def _bytes(one: Manifest) -> int:
    return sum(entry.bytes for entry in one.files.values())
