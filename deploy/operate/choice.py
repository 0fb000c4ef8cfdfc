"""Chooses the version that a rollback returns to: on the serving branch, kept, loadable, and clean of masked clicks.

For a fast rollback, a version is clean if it learned none of the clicks that the new masks name. For an exact
rollback, the training log before the version must contain none of them. The masks of earlier fast rollbacks then count
too: they excluded rows from training, but the log still contains those clicks.

1. Find the newest version that is clean by its manifest: its positions, its newest event, its users.
2. Read the training log from there up to the first masked row. All versions of the branch before that row are clean,
   the others are not.
3. A requested version must be clean. Without a request, take the newest clean version. The trainer must be able to
   continue from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deploy.operate.line import ServingLine, told
from deploy.operate.log_view import FirstHit, LogView, first_hit
from deploy.operate.times import iso
from state.errors import SettingsError, UnfitVersion, UnknownVersion
from state.registry.control import Control
from state.registry.manifest import Manifest
from state.registry.mask_entries import MaskEntry, joined
from state.registry.registry import Registry
from state.registry.segments import segments_to_end


@dataclass(frozen=True)
class Target:
    """The version that the operator requests.

    Attributes:
        to: A version, or None.
        before_ms: The newest version made before this moment, or None.
        exact: Whether the training log before the version must contain none of the masked clicks.
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
    """Chooses the version to roll back to.

    Args:
        registry: The registry with the versions.
        control: The newest control generation.
        target: The requested version; the newest clean version if it names none.
        new: The masks to add; an exact rollback also considers what the log still contains of older masks.
        view: The training log; None if Kafka does not answer.
        wait_ms: How long a row may wait for its label.

    Raises:
        UnknownVersion: The version is not kept, or its parts are not all available any more.
        UnfitVersion: The version is abandoned, it is not clean, or the trainer cannot continue from it.
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
    """Returns the newest clean version, or any clean version that is not older than the requested one."""
    control, enough = line.control, line.newest.version if target.to is None else target.to
    sure = line.surely_clean(left_out, wait_ms, target.exact)
    if sure is None:
        oldest = line.oldest()
        raise UnfitVersion(
            f"no version is kept that {'comes before all' if target.exact else 'has learned none'} of what is to be left out"
            + ("" if oldest is None else f"; the oldest is {told(oldest)}"),
            "name later clicks or fewer users; registry.base_keep_d says for how long versions are kept",
        )
    # Masks by offset are known to name clicks, so the log need not be read and serving switches sooner.
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
    """Returns whether the stream may still rewrite rows, so that a mask without a matching row is not a mistake."""
    return control.mode == "exact" and registry.outcome(control.epoch, "learned") is None


def _hit(
    registry: Registry, line: ServingLine, sure: Manifest, left_out: Sequence[MaskEntry], view: LogView, exact: bool
) -> FirstHit | None:
    segments = segments_to_end(registry, line.control, sure, line.newest, view.end)
    first = max(view.begin, min(segments[0].first, view.end))
    with view.reader(first) as reader:
        return first_hit(reader, view.partition, segments, joined(left_out, 0), exact)
