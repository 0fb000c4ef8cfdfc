"""The serving branch: the ancestry of the newest version in control's epoch, searched for versions clean of masks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
from safetensors import SafetensorError

from deploy.operate.times import iso
from state.errors import CorruptVersion, UnfitVersion, UnknownVersion
from state.features.masked_users import MaskedUsers
from state.positions import Source
from state.registry.control import Control
from state.registry.manifest import TOLD_MS, Manifest, sees
from state.registry.masks import MaskEntry
from state.registry.registry import SERVING, TRAINING, Registry
from state.registry.tensor_files import tensor_in

FAR_AHEAD_MS = 3_900_000
"""How far an event time can be ahead by default: a broker accepts timestamps 1 h ahead, plus 5 min for the event."""


class ServingLine:
    """The kept versions of the serving branch, oldest first. Searches are binary, because each manifest is a file.

    Args:
        registry: The registry with the versions.
        control: The newest control generation.

    Attributes:
        control: The newest control generation.
        newest: The newest version of control's epoch, or the epoch's base.

    Raises:
        UnknownVersion: There is no version yet.
    """

    def __init__(self, registry: Registry, control: Control) -> None:
        self._registry, self.control = registry, control
        self.newest = self._newest()
        self._numbers = [number for number in registry.versions() if sees(self.newest.visible, number)]

    def require(self, version: int) -> Manifest:
        """Returns the manifest of a version, which must be on the branch.

        Raises:
            UnknownVersion: The version is not kept.
            UnfitVersion: A rollback abandoned the version.
        """
        found = self._registry.manifest(version)
        if not sees(self.newest.visible, version):
            before = [number for number in self._numbers if number < version]
            raise UnfitVersion(
                f"version {version} is of epoch {found.epoch}, which a rollback abandoned: what is served does not descend from it",
                f"take {before[-1]}, the version of the serving line before it"
                if before
                else "look at `springtide versions`",
            )
        return found

    def last(self, holds: Callable[[Manifest], bool]) -> Manifest | None:
        """Returns the newest version for which `holds` is true, by binary search; None if there is none.

        `holds` must be monotone: if it is true for a version, it is true for all older ones.
        """
        low, high = 0, len(self._numbers)
        while low < high:
            middle = (low + high) // 2
            found = self._manifest(middle)
            if found is None:
                high -= 1
            elif holds(found):
                low = middle + 1
            else:
                high = middle
        return self._manifest(low - 1) if low else None

    def loadable(self, version: Manifest) -> Manifest:
        """Returns `version`, or the newest version before it on the branch that can be loaded.

        Raises:
            UnknownVersion: There is none.
        """
        place = bisect_left(self._numbers, version.version + 1)
        bases = [number for number in self._registry.bases() if number <= version.version and number in self._numbers]
        for number in (*reversed(self._numbers[max(0, place - 2) : place]), *reversed(bases)):
            try:
                self._registry.chain(number)
                return self._registry.manifest(number)
            except (UnknownVersion, CorruptVersion):
                continue
        self._registry.chain(version.version)
        return version

    def oldest(self) -> Manifest | None:
        """Returns the oldest kept version; None if none can be read."""
        return self._manifest(0) if self._numbers else None

    def in_log(self) -> list[MaskEntry]:
        """Returns the active masks whose clicks the training log may still contain: those of fast rollbacks."""
        return [one for one in self.control.masks if not one.excluded]

    def surely_clean(self, entries: Sequence[MaskEntry], wait_ms: int, exact: bool = False) -> Manifest | None:
        """Returns the newest version that, by its manifest and tables, learned nothing that `entries` name.

        Newer versions may be clean too; only the log shows where the first masked click is.

        Args:
            entries: The masks.
            wait_ms: How long a row may wait for its label; the label can be a masked click too.
            exact: Whether the log before the version must also contain none of it. A manifest cannot show this for a
                version trained under a mask whose clicks are in the log, nor for impressions that wait at the version.
        """
        hiding = [one for one in (*self.control.masks, *self.control.lifted) if exact and not one.excluded]
        trained_before = min((one.generation for one in hiding), default=None)
        margin_ms = wait_ms if exact else 0
        firsts = {
            (one.offsets[0], one.offsets[1]): one.offsets[2] for one in sorted(entries, key=_first) if one.offsets
        }
        begin_ms = min((one.times[0] for one in entries if one.times), default=None)
        users = [one.users for one in entries if one.users]

        def holds(version: Manifest) -> bool:
            if (
                trained_before is not None
                and (begin_ms is not None or users)
                and version.mask_generation >= trained_before
            ):
                return False
            late = begin_ms is not None and newest_told_ms(version, wait_ms) >= begin_ms - margin_ms
            return not late and all(after <= firsts.get(_word(source), after) for source, after in version.sources)

        found = self.last(holds)
        if found is None or not users:
            return found
        found = self._before(found, users)
        if found is None or not found.rows or not margin_ms:
            return found
        # Impressions of these users may wait at that version; its tables lack users of whom it has learned nothing.
        until_ms = newest_told_ms(found, wait_ms) - margin_ms
        return self.last(lambda version: newest_told_ms(version, wait_ms) < until_ms)

    def _before(self, version: Manifest, users: Sequence[MaskedUsers]) -> Manifest | None:
        """Returns the newest base up to `version` whose tables have none of the users, pending ones included."""
        for number in reversed(
            [one for one in self._registry.bases() if one <= version.version and one in self._numbers]
        ):
            try:
                base = self._registry.manifest(number, "base")
                if base.parent is None and not base.rows:
                    return base
                known = np.concatenate(
                    [self._ids(base, SERVING, "user.ids"), self._ids(base, TRAINING, "user.pending_ids")]
                )
            except (CorruptVersion, UnknownVersion, OSError, SafetensorError):
                continue
            if not any(bool(one.has(known).any()) for one in users):
                return base
        return None

    def _ids(self, base: Manifest, name: str, tensor: str) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        # Reads one tensor without verifying the file; the file is read in full before anything is loaded.
        found = tensor_in(self._registry.path_of(base, name), tensor)
        return np.empty(0, np.uint64) if found is None else np.asarray(found).view(np.uint64)

    def _newest(self) -> Manifest:
        base = self.control.base
        for number in reversed(self._registry.versions()):
            try:
                found = self._registry.manifest(number)
            except (CorruptVersion, UnknownVersion):
                continue
            if found.epoch == self.control.epoch or number == base:
                return found
        raise UnknownVersion(
            f"epoch {self.control.epoch} has no version yet", "the trainer publishes the first after the bootstrap"
        )

    def _manifest(self, place: int) -> Manifest | None:
        """Returns the manifest at an index; a version that was removed or is damaged is dropped from the branch."""
        try:
            return self._registry.manifest(self._numbers[place])
        except (CorruptVersion, UnknownVersion):
            del self._numbers[place]
            return None


def newest_told_ms(version: Manifest, wait_ms: int) -> int:
    """Returns an upper bound of the times of all rows that the version learned, of their events and labels, ms.

    Times more than `FAR_AHEAD_MS` ahead are ignored; otherwise one wrong clock would make every version look newer
    than it is.

    Args:
        version: The version's manifest; release 0.1.0 recorded the newest event time only.
        wait_ms: How long a row may wait for its label.
    """
    found = version.metrics.get(TOLD_MS)
    return version.event_time_ms + wait_ms if found is None else min(int(found), version.event_time_ms + FAR_AHEAD_MS)


def told(version: Manifest) -> str:
    """Describes a version by its number and creation time.

    Args:
        version: The version's manifest.
    """
    return f"version {version.version} of {iso(version.created_at_ms)}"


def _word(source: Source) -> tuple[int, int]:
    return source.topic, source.partition


def _first(entry: MaskEntry) -> int:
    """Sort key, later offsets first: of several ranges in a partition the earliest wins."""
    return -entry.offsets[2] if entry.offsets else 0
