"""How long a part that died waits for its next start: longer each time, until one start has lived for a while. Pure."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 30.0
HEALTHY_S = 60.0


@dataclass(frozen=True)
class Backoff:
    """Deaths in a row, none of them after a healthy life.

    Attributes:
        deaths: How many.
    """

    deaths: int = 0

    def after(self, lived_s: float) -> Backoff:
        """The same after one more death; a healthy life makes it the first one.

        >>> Backoff(3).after(1.0), Backoff(3).after(60.0)
        (Backoff(deaths=4), Backoff(deaths=1))
        """
        return Backoff(1 if lived_s >= HEALTHY_S else self.deaths + 1)

    @property
    def wait_s(self) -> float:
        """How long to wait before the next start; nothing where nobody died.

        >>> [Backoff(deaths).wait_s for deaths in (0, 1, 2, 3, 7, 8, 99)]
        [0.0, 0.25, 0.5, 1.0, 16.0, 30.0, 30.0]
        """
        if not self.deaths:
            return 0.0
        # A power beyond the longest wait is the longest wait, however often it died.
        return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(self.deaths - 1, 16))

    def told(self) -> str:
        """When the next start is, and how often it failed, in words.

        >>> Backoff(1).told(), Backoff(3).told()
        ('starting it again in 0.25 s', 'starting it again in 1 s, after 3 deaths in a row')
        """
        often = f", after {self.deaths} deaths in a row" if self.deaths > 1 else ""
        return f"starting it again in {self.wait_s:g} s{often}"
