"""Log segments of a version: the base that it can be recomputed from, and the ranges of the training log in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from state.errors import UnknownVersion
from state.features.erased import Erased
from state.features.mask import Mask, MaskAt, always
from state.registry.control import Control
from state.registry.log_line import WHOLE, LogLine
from state.registry.manifest import Manifest, sees
from state.registry.registry import Registry

NOTHING = always(Mask.NONE)


@dataclass(frozen=True, slots=True)
class LogSegment:
    """A range of the training log that was learned in one epoch.

    Attributes:
        first: Its first offset.
        next: The offset after its last record.
        mask_at: The mask at each generation: the rows left out.
        line: The branch: the records that count.
        epoch: Epoch of control.
        forget: Users whose rows are removed before its first record.
        erased: The last erasure in force in it.
    """

    first: int
    next: int
    mask_at: MaskAt = NOTHING
    line: LogLine = WHOLE
    epoch: int = 1
    forget: Erased = Erased.NOBODY
    erased: int = 0


def base_of(registry: Registry, target: Manifest, wanted: int | None) -> Manifest | None:
    """The version to start from: `wanted`, else the nearest base below `target`; None to start from scratch.

    Raises:
        UnknownVersion: There is none, it is not kept, or `target` does not descend from it.
    """
    if wanted is not None:
        if wanted > target.version or not sees(target.visible, wanted):
            raise UnknownVersion(
                f"version {target.version} does not descend from version {wanted}",
                "leave --from out, or take one of `springtide versions` on its line",
            )
        return registry.manifest(wanted)
    below = [one for one in registry.bases() if one < target.version and sees(target.visible, one)]
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
    """The segments from `base` along the branch of `newest`, and on to offset `end` under `control`.

    Args:
        registry: Holds versions and control.
        control: The newest control.
        base: A version that `newest` descends from, or `newest` itself.
        newest: The newest version of control's epoch, or the version that the epoch begins from.
        end: End offset of the log.

    Raises:
        UnknownVersion: A version that an epoch began from is no longer kept.
    """
    lasts = registry.generations.last_of_epochs(base.epoch, newest.epoch)
    found = segments_of(registry, lasts, base, newest) if base.version != newest.version else []
    return [*found, LogSegment(newest.log.next, max(end, newest.log.next), control.mask_at, control.log, control.epoch)]


def segments_of(
    registry: Registry, controls: Sequence[Control], base: Manifest | None, target: Manifest
) -> list[LogSegment]:
    """The segments from `base` to `target`, oldest first, each with its epoch's mask.

    Raises:
        UnknownVersion: A version that an epoch began from is no longer kept.
    """
    # The last control of an epoch knows which of its masks were lifted, and when.
    last = {control.epoch: control for control in controls}
    found: list[LogSegment] = []
    end = target
    while base is not None and end.epoch != base.epoch:
        start = last[end.epoch].base
        if start is None:
            raise UnknownVersion(f"epoch {end.epoch} began from nothing: version {base.version} does not lead to it")
        turned = registry.manifest(start)
        whole = LogSegment(turned.log.next, end.log.next, line=last[end.epoch].log, epoch=end.epoch)
        found += parted(whole, end, last[end.epoch], turned.erased)[::-1]
        end = turned
    first, erased = (target.log.first, 0) if base is None else (base.log.next, base.erased)
    whole = LogSegment(first, end.log.next)
    if end.epoch in last:
        whole = replace(whole, line=last[end.epoch].log, epoch=end.epoch)
        found += parted(whole, end, last[end.epoch], erased)[::-1]
    else:
        found.append(whole)
    return found[::-1]


def parted(whole: LogSegment, end: Manifest, control: Control, erased: int) -> list[LogSegment]:
    """Splits a segment at the offsets where its epoch applied erasures.

    Args:
        whole: The segment.
        end: The version at its end, which names those offsets.
        control: The last control of its epoch.
        erased: The last erasure that was applied before it.

    Raises:
        UnknownVersion: There were more erasures than a version names.
    """
    if end.erasures and end.erasures[0][0] > erased + 1 and end.erased - erased > len(end.erasures):
        raise UnknownVersion(
            f"version {end.version} cannot be recomputed from so far back: it does not say where all erasures between fell",
            "take a younger base with --from",
        )
    found, forget = list[LogSegment](), Erased.NOBODY
    for number, offset in end.erasures:
        if number > erased:
            at = max(offset, whole.first)
            found.append(
                replace(whole, next=at, mask_at=limited(control.mask_at, erased), forget=forget, erased=erased)
            )
            forget, erased, whole = control.erased.after(erased).up_to(number), number, replace(whole, first=at)
    return [*found, replace(whole, mask_at=limited(control.mask_at, erased), forget=forget, erased=erased)]


def limited(mask_at: MaskAt, erased: int) -> MaskAt:
    """The masks of `mask_at`, with only the erasures up to number `erased`."""

    @cache
    def found(generation: int) -> Mask:
        whole = mask_at(generation)
        return whole if erased >= whole.erased.last else replace(whole, erased=whole.erased.up_to(erased))

    return found
