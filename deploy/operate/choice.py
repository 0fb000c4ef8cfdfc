"""Chooses the version that a rollback goes back to: on the serving line, kept, loadable, and clean of what is masked.

For a fast rollback a version is clean if it learned none of the clicks that the
new masks name. For an exact one the training log before the version must have
none of them, and the masks of earlier fast rollbacks count too: they left rows
out of training, and the log still has those clicks.

1. The newest version that is clean by its manifest: its positions, its newest
   event, its users.
2. From there the training log is read up to the first masked row. All versions
   of the line before that row are clean, the others are not.
3. The version asked for must be clean. Without one, the newest clean version is
   taken. The trainer must be able to read on from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deploy.operate.line import ServingLine, told
from deploy.operate.log_scan import FirstHit, first_hit
from deploy.operate.log_view import LogView
from deploy.operate.times import iso
from state.errors import SettingsError, UnfitVersion, UnknownVersion
from state.registry.control import Control
from state.registry.manifest import Manifest
from state.registry.mask_entries import MaskEntry, joined
from state.registry.registry import Registry
from state.registry.segments import segments_to_end


@dataclass(frozen=True)
class Target:
    """What the operator asked for.

    Attributes:
        to: A version, or None.
        before_ms: The newest version made before this moment, or None.
        exact: Whether the training log before the version must have none of the masked clicks.
    """

    to: int | None = None
    before_ms: int | None = None
    exact: bool = False


def choose(
    registry: Registry,
    control: Control,
    target: Target,
    new: Sequence[MaskEntry],
    view: LogView | None,
    wait_ms: int,
) -> Manifest:
    """The version to go back to.

    Args:
        registry: Where versions are.
        control: The newest.
        target: What was asked for; the newest clean version where it names none.
        new: What is to be left out and is not yet; an exact rollback also considers what the log still has of older masks.
        view: Of the log; None where Kafka does not answer.
        wait_ms: How long a row may wait for its label.

    Raises:
        UnknownVersion: It is not kept, or cannot be put together any more.
        UnfitVersion: It is abandoned, it is not clean, or the trainer cannot read on from it.
        SettingsError: The mask names no row of the log.
        LogError: The log cannot be read.
    """
    line = ServingLine(registry, control)
    if target.to is not None:
        asked = line.require(target.to)
        registry.chain(target.to)
    else:
        asked = _before(line, target.before_ms)
    left_out = [*line.in_log(), *new] if target.exact else new
    clean = _newest_clean(registry, line, target, left_out, view, wait_ms) if left_out else line.newest
    if target.to is not None:
        if asked.version > clean.version:
            has = "comes after" if target.exact else "has learned"
            others = [str(one.id) for one in left_out if one not in new]
            also = f", those of mask {', '.join(others)} included: only training left them out so far" if others else ""
            raise UnfitVersion(
                f"version {asked.version} {has} clicks that are to be left out{also}",
                f"the newest version of the serving line that can be taken is {told(clean)}: `--to {clean.version}`, "
                "or `--before-mask`",
            )
        found = asked
    else:
        found = line.loadable(min(asked, clean, key=lambda one: one.version))
    if view is not None:
        view.require_reach(registry, found)
    return found


def _before(line: ServingLine, before_ms: int | None) -> Manifest:
    if before_ms is None:
        return line.newest
    found = line.last(lambda version: version.created_at_ms < before_ms)
    if found is None:
        oldest = line.oldest()
        hint = "there is none" if oldest is None else f"the oldest is {told(oldest)}"
        raise UnknownVersion(f"no version of the serving line was made before {iso(before_ms)}", hint)
    return found


def _newest_clean(
    registry: Registry,
    line: ServingLine,
    target: Target,
    left_out: Sequence[MaskEntry],
    view: LogView | None,
    wait_ms: int,
) -> Manifest:
    """The newest clean version, or any clean one from the target's version on."""
    control, enough = line.control, line.newest.version if target.to is None else target.to
    sure = line.surely_clean(left_out, wait_ms, target.exact)
    if sure is None:
        oldest = line.oldest()
        raise UnfitVersion(
            f"no version is kept that {'comes before all' if target.exact else 'has learned none'} of what is to be left out"
            + ("" if oldest is None else f"; the oldest is {told(oldest)}"),
            "name later clicks or fewer users; registry.base_keep_d says for how long versions are kept",
        )
    # Ranges that exist need name no row: then the log is not read, and answers turn the sooner.
    if view is None or (enough <= sure.version and all(one.offsets is not None for one in left_out)):
        return sure
    if sure.log.next < view.begin and sure.version != line.newest.version:
        raise UnfitVersion(
            f"the training log begins at offset {view.begin}: what was learned between {told(sure)} and there cannot be looked "
            f"at, and the trainer cannot read on from {sure.log.next}",
            f"let answers stay at it with `springtide pin {sure.version}`, or name later clicks",
        )
    hit = _hit(registry, line, sure, left_out, view, target.exact)
    if hit is None:
        is_new = any(one.offsets is None and one.generation > control.generation for one in left_out)
        if is_new and not _under_way(registry, control):
            raise SettingsError(
                "no row of the training log is named by --skip-time, --minutes or --skip-users: nothing would be left out",
                f"the log was looked through from {iso(sure.event_time_ms)} on; check times and ids, and with "
                "`springtide status` whether the stream has read that far",
            )
        return line.newest
    found = line.last(lambda version: (version.epoch, version.log.next) <= (hit.epoch, hit.offset))
    return sure if found is None or found.version < sure.version else found


def _under_way(registry: Registry, control: Control) -> bool:
    """Whether the stream may still write rows that it had written before: what names them then is no mistake."""
    return control.mode == "exact" and registry.outcome(control.epoch, "learned") is None


def _hit(
    registry: Registry, line: ServingLine, sure: Manifest, left_out: Sequence[MaskEntry], view: LogView, exact: bool
) -> FirstHit | None:
    segments = segments_to_end(registry, line.control, sure, line.newest, view.end)
    first = max(view.begin, min(segments[0].first, view.end))
    with view.reader(first) as reader:
        return first_hit(reader, view.partition, segments, joined(left_out, 0), exact)
