"""How long a process that died waits before its next start; exponential until one start stays healthy. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from state.errors import StoreFull, UnreachableBroker, UnusableDisk, UnusablePlace, UnusableRegistry

WAITS_FOR_OTHERS = (UnreachableBroker, StoreFull, UnusableDisk, UnusablePlace, UnusableRegistry)
FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 30.0
LONGEST_WAIT_FOR_OTHERS_S = 4.0
HEALTHY_S = 60.0


@dataclass(frozen=True)
class Backoff:
    """Consecutive deaths of a process without a healthy run between them.

    Attributes:
        deaths: How many deaths.
        waits_for_others: Whether the process died because a broker, a disk or a store was unavailable. Such a start
            fails within a second or two, and the process should run soon after the dependency is available again.
    """

    deaths: int = 0
    waits_for_others: bool = False

    def after(self, lived_s: float, last_line: str = "") -> Backoff:
        """Returns the backoff after one more death; after a healthy run it counts as the first.

        Args:
            lived_s: How long the process ran.
            last_line: The last line of its log, which names the class of the error.

        >>> Backoff(3).after(1.0).deaths, Backoff(3).after(60.0).deaths
        (4, 1)
        >>> Backoff().after(1.0, "trainer ERROR UnusableRegistry: registry: Permission denied").waits_for_others
        True
        """
        others = any(f" {error.__name__}: " in last_line for error in WAITS_FOR_OTHERS)
        return Backoff(1 if lived_s >= HEALTHY_S else self.deaths + 1, others)

    @property
    def wait_s(self) -> float:
        """How long to wait before the next start; 0 if there was no death.

        >>> [Backoff(deaths).wait_s for deaths in (0, 1, 2, 3, 7, 8, 99)]
        [0.0, 0.25, 0.5, 1.0, 16.0, 30.0, 30.0]
        >>> Backoff(99, waits_for_others=True).wait_s
        4.0
        """
        if not self.deaths:
            return 0.0
        # The exponent is capped, so that the power cannot overflow after many deaths.
        longest_s = LONGEST_WAIT_FOR_OTHERS_S if self.waits_for_others else LONGEST_WAIT_S
        return min(longest_s, FIRST_WAIT_S * 2.0 ** min(self.deaths - 1, 16))

    def told(self) -> str:
        """Describes when the next start is and how often the process died.

        >>> Backoff(1).told(), Backoff(3).told()
        ('starting it again in 0.25 s', 'starting it again in 1 s, after 3 deaths in a row')
        """
        often = f", after {self.deaths} deaths in a row" if self.deaths > 1 else ""
        return f"starting it again in {self.wait_s:g} s{often}"
