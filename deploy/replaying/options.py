"""Options of a replay from the command line: order, pace and times."""

from __future__ import annotations

from dataclasses import dataclass

from deploy.replaying.clock import MAX, Clock


@dataclass(frozen=True)
class Options:
    """Options of a replay.

    Attributes:
        sort: memory (read everything, then order by time) or assume (the files are in order).
        speed: Seconds of the recording per second, or MAX.
        keep: Keep times as recorded.
        limit: How many rows to send in this run; None: all.
        longest_wait_s: Upper bound of the pause for one gap.
    """

    sort: str = "memory"
    speed: float = MAX
    keep: bool = False
    limit: int | None = None
    longest_wait_s: float = 10.0

    def clock(self, now_ms: int, newest_ms: int) -> Clock:
        """Returns the clock of a replay that started at `now_ms`; the recording's newest time is `newest_ms`."""
        return Clock(self.speed, self.keep, now_ms, newest_ms, self.longest_wait_s * 1000)
