"""Ranges to learn again: of the training log, to recompute a version from a base; of the clicks, after a rollback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from state.errors import CorruptVersion, UnknownVersion
from state.features.erased import Erased
from state.features.mask import Mask, MaskAt, always
from state.positions import Source
from state.registry.control import Control
from state.registry.log_line import WHOLE, LogLine
from state.registry.manifest import Manifest, sees
from state.registry.registry import Registry

NOTHING = always(Mask.NONE)


@dataclass(frozen=True, slots=True)
class LogSegment:
    """A range of the training log that was learned in one epoch.

    Attributes:
        next: The offset after its last record.
        mask_at: The mask at each generation, which defines the rows to leave out.
        line: The branch, which defines the records that count.
        forget: Users whose rows are removed before its first record.
        erased: The last erasure in force in the segment.
    """

    first: int
    next: int
    mask_at: MaskAt = NOTHING
    line: LogLine = WHOLE
    epoch: int = 1
    forget: Erased = Erased.NOBODY
    erased: int = 0


def base_of(registry: Registry, target: Manifest, wanted: int | None) -> Manifest | None:
    """The version to start from: `wanted`, or else the nearest base below `target`; None to start from scratch.

    Raises:
        UnknownVersion: There is no such version, it is not kept, or `target` does not descend from it.
    """
    if wanted is not None:
        if wanted > target.version or not sees(target.visible, wanted):
            raise UnknownVersion(
                f"version {target.version} does not descend from version {wanted}",
                "leave --from out, or use one of `springtide versions` on its branch",
            )
        return registry.manifest(wanted)
    below = [number for number in registry.bases() if number < target.version and sees(target.visible, number)]
    if below:
        return registry.manifest(below[-1], "base")
    if target.parent is None:
        return None
    raise UnknownVersion(
        f"version {target.version} cannot be recomputed: no base before it is kept",
        "versions made after the oldest kept base can, see `springtide versions --all` and registry.base_keep_d",
    )


def segments_to_end(
    registry: Registry, control: Control, base: Manifest, newest: Manifest, end: int
) -> list[LogSegment]:
    """The segments from `base` along the branch of `newest`, continued to offset `end` of the log under `control`.

    `newest` is the newest version of control's epoch, or the version from which the epoch begins. It descends from
    `base`.

    Raises:
        UnknownVersion: A version that an epoch began from is no longer kept.
    """
    lasts = registry.generations.last_of_epochs(base.epoch, newest.epoch)
    before = segments_of(registry, lasts, base, newest) if base.version != newest.version else []
    return [
        *before,
        LogSegment(newest.log.next, max(end, newest.log.next), control.mask_at, control.log, control.epoch),
    ]


def segments_of(
    registry: Registry, controls: Sequence[Control], base: Manifest | None, target: Manifest
) -> list[LogSegment]:
    """The segments from `base` to `target`, oldest first, each with its epoch's mask.

    Raises:
        UnknownVersion: A version that an epoch began from is no longer kept.
    """
    # The last control of an epoch records which of its masks were lifted, and when.
    last = {control.epoch: control for control in controls}
    segments: list[LogSegment] = []
    end = target
    while base is not None and end.epoch != base.epoch:
        start = last[end.epoch].base
        if start is None:
            raise UnknownVersion(
                f"epoch {end.epoch} began from scratch: version {base.version} does not lead to it",
                "use a newer base with --from",
            )
        turned = registry.manifest(start)
        segment = LogSegment(turned.log.next, end.log.next, line=last[end.epoch].log, epoch=end.epoch)
        segments += parted(segment, end, last[end.epoch], turned.erased)[::-1]
        end = turned
    first, erased = (target.log.first, 0) if base is None else (base.log.next, base.erased)
    segment = LogSegment(first, end.log.next)
    if end.epoch in last:
        segment = replace(segment, line=last[end.epoch].log, epoch=end.epoch)
        segments += parted(segment, end, last[end.epoch], erased)[::-1]
    else:
        segments.append(segment)
    return segments[::-1]


def parted(segment: LogSegment, end: Manifest, control: Control, erased: int) -> list[LogSegment]:
    """Splits the segment before version `end` at the offsets where its epoch applied erasures, after number `erased`.

    Raises:
        UnknownVersion: There were more erasures than a version names.
    """
    if end.erasures and end.erasures[0][0] > erased + 1 and end.erased - erased > len(end.erasures):
        raise UnknownVersion(
            f"version {end.version} cannot be recomputed from so far back: it does not list the positions of all erasures since then",
            "use a newer base with --from",
        )
    segments, forget = list[LogSegment](), Erased.NOBODY
    for number, offset in end.erasures:
        if number > erased:
            at = max(offset, segment.first)
            segments.append(
                replace(segment, next=at, mask_at=limited(control.mask_at, erased), forget=forget, erased=erased)
            )
            forget, erased, segment = control.erased.after(erased).up_to(number), number, replace(segment, first=at)
    return [*segments, replace(segment, mask_at=limited(control.mask_at, erased), forget=forget, erased=erased)]


def limited(mask_at: MaskAt, erased: int) -> MaskAt:
    """The masks of `mask_at`, with only the erasures up to number `erased`."""

    @cache
    def limited_mask_at(generation: int) -> Mask:
        mask = mask_at(generation)
        return mask if erased >= mask.erased.last else replace(mask, erased=mask.erased.up_to(erased))

    return limited_mask_at


ClickRanges = Mapping[Source, tuple[int, int]]
"""By source: the first click, and the offset after the last one."""


def learned_before(registry: Registry, epoch: int) -> dict[Source, int]:
    """For each source, the first click that was not learned when `epoch` began.

    If the previous epoch had not caught up, the epochs before it count too. Versions of `epoch` and later do not count.

    Raises:
        CorruptVersion: A control generation or an outcome fails its digest.
    """
    goal: dict[Source, int] = {}
    for number in sorted({*registry.versions(), *registry.recents()}, reverse=True):
        try:
            manifest = registry.either(number)
        except (UnknownVersion, CorruptVersion):
            continue
        if manifest.epoch < epoch:
            epoch = manifest.epoch
            goal |= {source: max(mark, goal.get(source, 0)) for source, mark in manifest.marks.items()}
            if has_caught_up(registry, epoch):
                break
    return goal


def has_caught_up(registry: Registry, epoch: int) -> bool:
    """Whether an epoch has caught up: the trainer recorded that, or it is the first epoch, or began with an upgrade.

    Raises:
        CorruptVersion: A control generation or the outcome fails its digest.
    """
    began = registry.generations.beginning_of(epoch)
    if began is None or began.base is None or began.action == "upgrade":
        return True
    return registry.generations.outcome(epoch, "learned") is not None


def clicks_in(ranges: ClickRanges) -> int:
    """The number of clicks in ranges; a click of a partition that is in several buckets counts once.

    >>> zero, one = Source("ab" * 16, 0, 0, 2), Source("ab" * 16, 0, 1, 2)
    >>> clicks_in({zero: (4, 9), one: (5, 10)})
    6
    """
    merged: dict[tuple[str, int], tuple[int, int]] = {}
    for source, (first, after) in ranges.items():
        low, high = merged.get((source.topic_id, source.partition), (first, after))
        merged[source.topic_id, source.partition] = min(low, first), max(high, after)
    return sum(high - low for low, high in merged.values())


def to_json(ranges: ClickRanges) -> dict[str, list[int]]:
    """Converts ranges to JSON values."""
    return {str(source): [first, after] for source, (first, after) in sorted(ranges.items())}


def from_json(document: Mapping[str, list[int]]) -> dict[Source, tuple[int, int]]:
    """Reads the ranges that `to_json` returned."""
    return {Source.parse(source): (int(first), int(after)) for source, (first, after) in document.items()}
