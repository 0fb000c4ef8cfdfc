"""The serving branch, and the version of it that a rollback returns to."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError

from deploy.formats import iso
from deploy.operate.log_view import LogView, first_hit
from state.errors import CorruptVersion, SettingsError, UnfitVersion, UnknownVersion
from state.features.erased import MaskedUsers
from state.registry.control import Control, MaskEntry, joined
from state.registry.manifest import TOLD_MS, Kind, Manifest, sees
from state.registry.registry import SERVING, TRAINING, Registry
from state.registry.segments import segments_to_end
from state.registry.tensor_files import tensor_in

FAR_AHEAD_MS = 3_900_000
"""How far an event time can be ahead by default: a broker accepts timestamps 1 h ahead, plus 5 min for the event."""


class ServingBranch:
    """The kept versions of the serving branch, oldest first. Searches are binary, because each manifest is a file.

    Attributes:
        newest: The newest version of control's epoch, or the epoch's base.

    Raises:
        UnknownVersion: There is no version yet.
    """

    def __init__(self, registry: Registry, control: Control) -> None:
        self.registry, self.control = registry, control
        self.newest = self._newest()
        self._numbers = [number for number in registry.versions() if sees(self.newest.visible, number)]

    def require(self, version: int) -> Manifest:
        """Returns the manifest of a version, which must be on the branch.

        Raises:
            UnknownVersion: The version is not kept.
            UnfitVersion: A rollback abandoned the version.
        """
        manifest = self.registry.manifest(version)
        if not sees(self.newest.visible, version):
            before = [number for number in self._numbers if number < version]
            raise UnfitVersion(
                f"version {version} is of epoch {manifest.epoch}, which a rollback abandoned: the served version does not descend from it",
                f"take {before[-1]}, the version of the serving branch before it"
                if before
                else "look at `springtide versions`",
            )
        return manifest

    def last(self, holds: Callable[[Manifest], bool]) -> Manifest | None:
        """Returns the newest version for which `holds` is true, by binary search; None if there is none.

        `holds` must be monotone: if it is true for a version, it is true for all older ones.
        """
        low, high = 0, len(self._numbers)
        while low < high:
            middle = (low + high) // 2
            manifest = self._manifest(middle)
            if manifest is None:
                high -= 1
            elif holds(manifest):
                low = middle + 1
            else:
                high = middle
        return self._manifest(low - 1) if low else None

    def loadable(self, version: Manifest) -> Manifest:
        """Returns `version`, or the newest version before it on the branch that can be loaded.

        Raises:
            UnknownVersion: There is none.
        """
        position = bisect_left(self._numbers, version.version + 1)
        bases = [number for number in self.registry.bases() if number <= version.version and number in self._numbers]
        for number in (*reversed(self._numbers[max(0, position - 2) : position]), *reversed(bases)):
            try:
                self.registry.chain(number)
                return self.registry.manifest(number)
            except (UnknownVersion, CorruptVersion):
                continue
        self.registry.chain(version.version)
        return version

    def oldest(self) -> Manifest | None:
        """Returns the oldest kept version; None if none can be read."""
        return self._manifest(0) if self._numbers else None

    def in_log(self) -> list[MaskEntry]:
        """Returns the active masks whose clicks the training log may still contain: those of fast rollbacks."""
        return [mask for mask in self.control.masks if not mask.excluded]

    def surely_clean(self, entries: Sequence[MaskEntry], wait_ms: int, exact: bool) -> Manifest | None:
        """Returns the newest version that, by its manifest and tables, learned nothing that `entries` name.

        Newer versions may be clean too; only the log shows where the first masked click is.

        Args:
            entries: The masks.
            wait_ms: How long a row may wait for its label; the label can be a masked click too.
            exact: Whether the log before the version must also contain none of it. A manifest cannot show this for a
                version trained under a mask whose clicks are in the log, nor for impressions that wait at the version.
        """
        hiding = [mask for mask in (*self.control.masks, *self.control.lifted) if exact and not mask.excluded]
        trained_before = min((mask.generation for mask in hiding), default=None)
        margin_ms = wait_ms if exact else 0
        firsts: dict[tuple[int, int], int] = {}
        for topic, partition, first, _ in (entry.offsets for entry in entries if entry.offsets):
            firsts[topic, partition] = min(first, firsts.get((topic, partition), first))
        begin_ms = min((entry.span[0] for entry in entries if entry.span), default=None)
        users = [entry.users for entry in entries if entry.users]

        def holds(version: Manifest) -> bool:
            if (
                trained_before is not None
                and (begin_ms is not None or users)
                and version.mask_generation >= trained_before
            ):
                return False
            late = begin_ms is not None and newest_learned_ms(version, wait_ms) >= begin_ms - margin_ms
            return not late and all(
                after <= firsts.get((source.topic, source.partition), after) for source, after in version.sources
            )

        version = self.last(holds)
        if version is None or not users:
            return version
        version = self._before(version, users)
        if version is None or not version.rows or not margin_ms:
            return version
        # Impressions of these users may wait at that version; its tables lack users of whom it has learned nothing.
        until_ms = newest_learned_ms(version, wait_ms) - margin_ms
        return self.last(lambda version: newest_learned_ms(version, wait_ms) < until_ms)

    def _before(self, version: Manifest, users: Sequence[MaskedUsers]) -> Manifest | None:
        """Returns the newest version up to `version` that surely knows none of the users.

        It starts at the newest base without these users and passes the deltas after it until one has a user.
        """
        bases = [base for base in self.registry.bases() if base <= version.version and base in self._numbers]
        for part in (self._part(base, "base") for base in reversed(bases)):
            if part is not None and self._has_none(part, users):
                return self._last_without(users, part, version)
        return None

    def _last_without(self, users: Sequence[MaskedUsers], base: Manifest, last: Manifest) -> Manifest:
        clean = base
        for number in [number for number in self._numbers if base.version < number <= last.version]:
            delta = self._part(number, "delta")
            if delta is None or delta.parent != clean.version or not self._has_none(delta, users):
                break
            clean = delta
        return clean

    def _part(self, version: int, kind: Kind) -> Manifest | None:
        with suppress(CorruptVersion, UnknownVersion):
            return self.registry.manifest(version, kind)
        return None

    def _has_none(self, part: Manifest, users: Sequence[MaskedUsers]) -> bool:
        """Whether the rows and the waiting ids of a base or a delta have none of the users; False if they are damaged."""
        if part.parent is None and not part.rows:
            return True
        try:
            known = [self._ids(part, SERVING, "user.ids"), self._ids(part, TRAINING, "user.pending_ids")]
        except (OSError, SafetensorError):
            return False
        return not any(bool(masked.has(ids).any()) for masked in users for ids in known)

    def _ids(self, base: Manifest, name: str, tensor: str) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        # Reads one tensor without verifying the file; the file is read in full before anything is loaded.
        array = tensor_in(self.registry.path_of(base, name), tensor)
        return np.empty(0, np.uint64) if array is None else np.asarray(array).view(np.uint64)

    def _newest(self) -> Manifest:
        base = self.control.base
        for number in reversed(self.registry.versions()):
            try:
                manifest = self.registry.manifest(number)
            except (CorruptVersion, UnknownVersion):
                continue
            if manifest.epoch == self.control.epoch or number == base:
                return manifest
        raise UnknownVersion(
            f"epoch {self.control.epoch} has no version yet", "the trainer publishes the first after the bootstrap"
        )

    def _manifest(self, index: int) -> Manifest | None:
        """Returns the manifest at an index; a version that was removed or is damaged is dropped from the branch."""
        try:
            return self.registry.manifest(self._numbers[index])
        except (CorruptVersion, UnknownVersion):
            del self._numbers[index]
            return None


def newest_learned_ms(version: Manifest, wait_ms: int) -> int:
    """Returns an upper bound of the times of all rows that the version learned, of their events and labels, ms.

    Times more than `FAR_AHEAD_MS` ahead are ignored; otherwise one wrong clock would make every version look newer
    than it is. Release 0.1.0 recorded the newest event time only, so `wait_ms`, the time for which a row may wait for
    its label, is added to it.
    """
    newest = version.metrics.get(TOLD_MS)
    return version.event_time_ms + wait_ms if newest is None else min(int(newest), version.event_time_ms + FAR_AHEAD_MS)


def described(version: Manifest) -> str:
    """Describes a version by its number and creation time."""
    return f"version {version.version} of {iso(version.created_at_ms)}"


@dataclass(frozen=True)
class Target:
    """What the operator asks a rollback for: a version, the newest one before a moment, or neither.

    Attributes:
        exact: Whether the training log before the version must contain none of the masked clicks.
        new: The masks to add; an exact rollback also considers what the log still contains of older masks.
        wait_ms: How long a row may wait for its label.
    """

    to: int | None = None
    before_ms: int | None = None
    exact: bool = False
    new: Sequence[MaskEntry] = ()
    wait_ms: int = 0


def choose(branch: ServingBranch, target: Target, view: LogView | None) -> Manifest:
    """Chooses the version to roll back to: kept, loadable, and clean of masked clicks.

    For a fast rollback, a version is clean if it learned none of the clicks that the new masks name. For an exact
    rollback, the training log before the version must contain none of them. The masks of earlier fast rollbacks then
    count too: they excluded rows from training, but the log still contains those clicks.

    1. Find the newest version that is clean by its manifest: its positions, its newest event, its users.
    2. Read the training log from there up to the first masked row. All versions of the branch before that row are
       clean, the others are not.
    3. A requested version must be clean. Without a request, take the newest clean version. The trainer must be able
       to continue from it.

    `view` is None if Kafka does not answer.

    Raises:
        UnknownVersion: The version is not kept, or parts of it are no longer available.
        UnfitVersion: The version is abandoned, it is not clean, or the trainer cannot continue from it.
        SettingsError: The mask names no row of the log.
        LogError: The log cannot be read.
    """
    if target.to is not None:
        wanted = branch.require(target.to)
        branch.registry.chain(target.to)
    else:
        wanted = _before(branch, target.before_ms)
    masks = [*branch.in_log(), *target.new] if target.exact else target.new
    clean = _newest_clean(branch, target, masks, view) if masks else branch.newest
    if target.to is None:
        chosen = branch.loadable(min(wanted, clean, key=lambda version: version.version))
    elif wanted.version <= clean.version:
        chosen = wanted
    else:
        has = "comes after" if target.exact else "has learned"
        earlier = [str(mask.id) for mask in masks if mask not in target.new]
        also = f", those of mask {', '.join(earlier)} included: only training left them out so far" if earlier else ""
        raise UnfitVersion(
            f"version {wanted.version} {has} clicks that are to be left out{also}",
            f"the newest version of the serving branch that can be taken is {described(clean)}: `--to {clean.version}`, "
            "or `--before-mask`",
        )
    if view is not None:
        view.require_reach(branch.registry, chosen)
    return chosen


def _before(branch: ServingBranch, before_ms: int | None) -> Manifest:
    if before_ms is None:
        return branch.newest
    version = branch.last(lambda version: version.created_at_ms < before_ms)
    if version is None:
        oldest = branch.oldest()
        hint = "there is none" if oldest is None else f"the oldest is {described(oldest)}"
        raise UnknownVersion(f"no version of the serving branch was made before {iso(before_ms)}", hint)
    return version


def _newest_clean(branch: ServingBranch, target: Target, masks: Sequence[MaskEntry], view: LogView | None) -> Manifest:
    enough = branch.newest.version if target.to is None else target.to
    sure = branch.surely_clean(masks, target.wait_ms, target.exact)
    if sure is None:
        oldest = branch.oldest()
        raise UnfitVersion(
            f"no kept version {'precedes all' if target.exact else 'has learned none'} of the clicks to leave out"
            + ("" if oldest is None else f"; the oldest is {described(oldest)}"),
            "name later clicks or fewer users; registry.base_keep_d sets how long versions are kept",
        )
    # Masks by offset are known to name clicks, so the log need not be read and serving switches sooner.
    if view is None or (enough <= sure.version and all(mask.offsets is not None for mask in masks)):
        return sure
    if sure.log.next < view.begin and sure.version != branch.newest.version:
        raise UnfitVersion(
            f"the training log begins at offset {view.begin}: the clicks between {described(sure)} and that offset cannot "
            f"be searched, and the trainer cannot continue from {sure.log.next}",
            f"keep answers at it with `springtide pin {sure.version}`, or name later clicks",
        )
    segments = segments_to_end(branch.registry, branch.control, sure, branch.newest, view.end)
    with view.reader(max(view.begin, min(segments[0].first, view.end))) as reader:
        hit = first_hit(reader, segments, joined(masks, 0), target.exact)
    if hit is not None:
        position = (hit.epoch, hit.offset)
        version = branch.last(lambda version: (version.epoch, version.log.next) <= position)
        return sure if version is None or version.version < sure.version else version
    control = branch.control
    is_new = any(mask.offsets is None and mask.generation > control.generation for mask in masks)
    # While the stream may still rewrite rows, a mask without a matching row is no mistake.
    rewrites = control.mode == "exact" and branch.registry.generations.outcome(control.epoch, "learned") is None
    if is_new and not rewrites:
        raise SettingsError(
            "no row of the training log is named by the times and users to leave out: nothing would be left out",
            f"the log was searched from {iso(sure.event_time_ms)} on; check times and ids, and with "
            "`springtide status` whether the stream has read that far",
        )
    return branch.newest
