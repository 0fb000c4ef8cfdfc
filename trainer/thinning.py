"""Which versions stay by their age, which deltas are merged into one, and which bases are needed to load them. Pure.

A version stays while it is young; later the newest of each ten minutes, then of
each hour does. What lies between is merged into the delta of the next one that
stays: loading it gives the same bits. A base goes where the one before it and
the deltas since then load quickly too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from state.registry.manifest import Manifest, sees

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
SPARE_BASES = 2
"""The newest bases stay: a damaged one falls back to the one before."""


@dataclass(frozen=True, slots=True)
class Tiers:
    """How long what is kept.

    Attributes:
        each_ms: Each durable version.
        thin_ms: One in `thin_every_ms`.
        sparse_ms: One in `sparse_every_ms`.
        thin_every_ms: The distance of versions older than `each_ms`.
        sparse_every_ms: The distance of those older than `thin_ms`.
        most_bytes: All versions together.
        load_bytes: Deltas that may be read beyond a base of less than that.
    """

    each_ms: int
    thin_ms: int
    sparse_ms: int
    thin_every_ms: int = 600_000
    sparse_every_ms: int = HOUR_MS
    most_bytes: int = 1 << 60
    load_bytes: int = 64_000_000


class Merge(NamedTuple):
    """Deltas to become one.

    Attributes:
        path: The versions, oldest first; the last one stays.
        parent: The version that the first one continues.
    """

    path: tuple[int, ...]
    parent: int


class Thinning(NamedTuple):
    """What is to be done, in this order.

    Attributes:
        merges: Deltas to merge.
        deltas: Versions whose deltas go.
        bases: Versions whose bases go.
    """

    merges: list[Merge]
    deltas: list[int]
    bases: list[int]


def plan(
    deltas: Sequence[Manifest], bases: Sequence[Manifest], keep: Collection[int], tiers: Tiers, now_ms: int
) -> Thinning:
    """What to merge and what to remove, so that all that stays can be loaded.

    Args:
        deltas: Of the versions, ascending.
        bases: Likewise.
        keep: Versions that stay whatever their age.
        tiers: How long what is kept.
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
        # The oldest go first, with the base that they start from.
        wanted = {version for version in wanted if version >= base.version or version in must}
        found = _thinned(held, wanted, expired, tiers)
    return found


class _Held:
    """The versions there are."""

    def __init__(self, deltas: Sequence[Manifest], bases: Sequence[Manifest]) -> None:
        self.deltas = {one.version: one for one in deltas}
        self.bases = {one.version: one for one in bases}
        self.all: Mapping[int, Manifest] = self.bases | self.deltas

    def path(self, version: int, stops: Collection[int]) -> tuple[list[int], int | None]:
        """The deltas from `version` back to before one of `stops`, newest first, and that one; None where none is reached."""
        path: list[int] = []
        at: int | None = version
        while at is not None and (at == version or at not in stops):
            if at not in self.deltas:
                return path, None
            path.append(at)
            at = self.deltas[at].parent
        return path, at

    def start(self, version: int, bases: Collection[int]) -> int | None:
        """Of ascending `bases` the one that `version` is loaded from."""
        line = self.all[version].visible
        return max((one for one in bases if one <= version and sees(line, one)), default=None)

    def weight(self, versions: Collection[int]) -> int:
        """The bytes of deltas."""
        return sum(_bytes(self.deltas[version]) for version in versions)

    def bytes_after(self, plan: Thinning) -> int:
        """At most so many bytes are left, of all."""
        merged = {version for merge in plan.merges for version in merge.path}
        gone = set(plan.deltas) - merged
        kept = [one for version, one in self.bases.items() if version not in plan.bases]
        return self.weight(self.deltas.keys() - gone) + sum(map(_bytes, kept))


def _young_enough(held: _Held, tiers: Tiers, now_ms: int) -> set[int]:
    """Versions that stay by their age; and where an epoch turned off from another: each has its own line of the log."""
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
            # Loaded from its own base; or what it needs is gone, and nobody takes it for good.
            if version not in kept:
                live.add(version)
            continue
        live.add(version)
        if len(path) > 1:
            merges.append(Merge(tuple(reversed(path)), parent))
    gone = sorted(held.deltas.keys() - live)
    return Thinning(merges, gone, sorted(held.bases.keys() - kept))


def _needed_bases(held: _Held, wanted: Collection[int], expired: Collection[int], tiers: Tiers) -> set[int]:
    """The bases that `wanted` versions start from, without those that one before is near enough to, which is to stay too."""
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
