"""How to replay: order, pace and times, as the command line has them."""

from __future__ import annotations

from dataclasses import dataclass

from deploy.replaying.clock import MAX, Clock


@dataclass(frozen=True)
class Options:
    """How to replay.

    Attributes:
        sort: memory (read everything, then order by time) or assume (the files are in order).
        speed: Seconds of the recording per second, or MAX.
        keep: Leave times as recorded.
        limit: So many rows in this run; None: all.
        longest_wait_s: A gap takes no longer than this.
    """

    sort: str = "memory"
    speed: float = MAX
    keep: bool = False
    limit: int | None = None
    longest_wait_s: float = 10.0

    def clock(self, now_ms: int, newest_ms: int) -> Clock:
        """The clock of a replay that began at `now_ms`, of a recording whose newest time is `newest_ms`."""
        return Clock(self.speed, self.keep, now_ms, newest_ms, self.longest_wait_s * 1000)
