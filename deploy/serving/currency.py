"""How current a host's stores are: the moment up to which they hold all that there was, noted by the applier for workers.

Not the age of what they hold: where nobody clicks, old histories are current.
The applier asks the log where it ends, and once it has read to there, its
histories hold all that the log held when it asked; likewise a look at the
registry that finds nothing new. So a broker, a registry or an applier that is
away is seen, and so is an applier that falls behind.

The moment is the time of a file, so that noting it costs nearly nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

VERSIONS, CLICKS = "version", "histories"
"""The parts, as /readyz names them."""

NOTE_MS = 1000


class Currency:
    """The notes of one host.

    Args:
        folder: Of serving.
        name: What the files' names begin with.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._paths = {part: folder / f"{name}.{part}" for part in (VERSIONS, CLICKS)}
        self._noted_ms = dict.fromkeys(self._paths, 0)

    def note(self, part: str, at_ms: int) -> None:
        """The part holds all that there was at that moment; kept at most once a second."""
        if 0 <= at_ms - self._noted_ms[part] < NOTE_MS:
            return
        self._noted_ms[part] = at_ms
        path = self._paths[part]
        # Where a disk is full before there is a file nothing is noted, and readiness says so.
        with suppress(OSError):
            path.touch()
            os.utime(path, ns=(at_ms * 1_000_000, at_ms * 1_000_000))

    def ages_s(self, now_ms: int) -> dict[str, float | None]:
        """By part for how long it has not held all that there was; None where that was never noted."""
        found = dict[str, float | None]()
        for part, path in self._paths.items():
            try:
                found[part] = (now_ms - path.stat().st_mtime_ns // 1_000_000) / 1000
            except FileNotFoundError:
                found[part] = None
        return found

    def older_than(self, max_age_s: float, now_ms: int) -> dict[str, str]:
        """By part what is wrong with those that were current longer ago, or never."""
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
    """Whether histories hold what the log held when it was last asked where it ends. Used by one thread.

    Args:
        every_ms: How often the log is asked.
    """

    def __init__(self, every_ms: int) -> None:
        self._every_ms = every_ms
        self._asked_ms = 0
        self._wanted: tuple[int, Mapping[int, int]] | None = None

    def due(self, now_ms: int) -> bool:
        """Whether to ask now."""
        return self._wanted is None and not 0 <= now_ms - self._asked_ms < self._every_ms

    def asked(self, now_ms: int, ends: Mapping[int, int]) -> None:
        """The log ended there, by partition, when it was asked at that moment."""
        self._asked_ms, self._wanted = now_ms, (now_ms, ends)

    def reached(self, positions: Mapping[int, int]) -> int | None:
        """The moment at which it was asked, once, when the positions are all at those ends.

        >>> check = LogCheck(1000)
        >>> check.asked(5000, {0: 10})
        >>> check.reached({0: 9}), check.reached({0: 10}), check.reached({0: 10})
        (None, 5000, None)
        """
        if self._wanted is None or any(positions.get(one, 0) < end for one, end in self._wanted[1].items()):
            return None
        at_ms, self._wanted = self._wanted[0], None
        return at_ms
