"""Records how current a host's stores are: the time up to which they are complete.

The applier writes that time, and workers read it. It is not the age of the
data: without new clicks, old histories are current. The applier reads the end
offsets of the log. Once it has consumed up to them, its histories hold all that
the log held at that time. A poll of the registry that finds nothing new counts
in the same way. So an unreachable broker or registry, a stopped applier and an
applier that falls behind all become visible.

The time is the modification time of a file, so recording it is cheap.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

VERSIONS, CLICKS = "version", "histories"
"""The parts, named as in /readyz."""

NOTE_MS = 1000


class Currency:
    """The files that record how current the stores of one host are.

    Args:
        folder: The serving directory.
        name: The prefix of the file names.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._paths = {part: folder / f"{name}.{part}" for part in (VERSIONS, CLICKS)}
        self._noted_ms = dict.fromkeys(self._paths, 0)

    def note(self, part: str, at_ms: int) -> None:
        """Records that the part is complete up to `at_ms`; written at most once a second."""
        if 0 <= at_ms - self._noted_ms[part] < NOTE_MS:
            return
        self._noted_ms[part] = at_ms
        path = self._paths[part]
        # If the disk is full before the file exists, nothing is recorded, and readiness reports it.
        with suppress(OSError):
            path.touch()
            os.utime(path, ns=(at_ms * 1_000_000, at_ms * 1_000_000))

    def ages_s(self, now_ms: int) -> dict[str, float | None]:
        """Returns, by part, the time in seconds since it was last complete; None if that was never recorded."""
        found = dict[str, float | None]()
        for part, path in self._paths.items():
            try:
                found[part] = (now_ms - path.stat().st_mtime_ns // 1_000_000) / 1000
            except FileNotFoundError:
                found[part] = None
        return found

    def older_than(self, max_age_s: float, now_ms: int) -> dict[str, str]:
        """Returns a message for each part that was last complete more than `max_age_s` ago, or never."""
        found = {}
        for part, age_s in self.ages_s(now_ms).items():
            if age_s is None:
                found[part] = "the applier has not said yet that all is taken up"
            elif age_s > max_age_s:
                found[part] = (
                    f"what came in the last {age_s:.0f} s is not all taken up (serving.max_age_s {max_age_s:g})"
                )
        return found


class LogCheck:
    """Checks whether histories have reached the end offsets that the log last reported. Used by one thread.

    Args:
        every_ms: The interval between requests for the end offsets.
    """

    def __init__(self, every_ms: int) -> None:
        self._every_ms = every_ms
        self._asked_ms = 0
        self._wanted: tuple[int, Mapping[int, int]] | None = None

    def due(self, now_ms: int) -> bool:
        """Whether to request the end offsets now."""
        return self._wanted is None and not 0 <= now_ms - self._asked_ms < self._every_ms

    def asked(self, now_ms: int, ends: Mapping[int, int]) -> None:
        """Records the end offsets by partition, requested at `now_ms`."""
        self._asked_ms, self._wanted = now_ms, (now_ms, ends)

    def reached(self, positions: Mapping[int, int]) -> int | None:
        """Returns the time of the request, once, when all positions have reached the end offsets; else None.

        >>> check = LogCheck(1000)
        >>> check.asked(5000, {0: 10})
        >>> check.reached({0: 9}), check.reached({0: 10}), check.reached({0: 10})
        (None, 5000, None)
        """
        if self._wanted is None or any(positions.get(one, 0) < end for one, end in self._wanted[1].items()):
            return None
        at_ms, self._wanted = self._wanted[0], None
        return at_ms
