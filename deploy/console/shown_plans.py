"""Plans of rollbacks that were shown: only what was shown is done, and only while control is what it was then."""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from state.errors import ControlConflict

MOST, KEEP_S = 32, 900.0


@dataclass(frozen=True)
class ShownPlan:
    """A rollback as it was shown.

    Attributes:
        words: The command without reason and name, all of its times written out.
        version: The version gone back to.
        shown_s: When, monotonic seconds.
    """

    words: tuple[str, ...]
    version: int
    shown_s: float


class ShownPlans:
    """The plans of the last quarter of an hour, by digest. Only the event loop's thread may ask.

    Args:
        clock_s: Monotonic seconds.
    """

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._plans: OrderedDict[str, ShownPlan] = OrderedDict()

    def add(self, words: Sequence[str], plan: Mapping[str, Any]) -> str:
        """Keeps one; returns its digest.

        Args:
            words: See `ShownPlan`.
            plan: The plan's document.

        >>> plans = ShownPlans(lambda: 0.0)
        >>> digest = plans.add(["rollback", "--to=3"], {"to": 3})
        >>> plans.take(digest, 3).words
        ('rollback', '--to=3')
        """
        digest = hashlib.sha256(json.dumps([list(words), plan["to"]]).encode()).hexdigest()
        self._plans[digest] = ShownPlan(tuple(words), int(plan["to"]), self._clock_s())
        self._plans.move_to_end(digest)
        while len(self._plans) > MOST:
            self._plans.popitem(last=False)
        return digest

    def take(self, digest: str, confirmed: int) -> ShownPlan:
        """The plan of a digest.

        Args:
            digest: Of `add`.
            confirmed: The version that the operator types once more.

        Raises:
            ControlConflict: No such plan was shown of late, or it goes back to another version.
        """
        found = self._plans.get(digest)
        if found is None or self._clock_s() - found.shown_s > KEEP_S:
            raise ControlConflict("no such plan was shown of late", "make the plan anew, and look at it")
        if found.version != confirmed:
            raise ControlConflict(
                f"the plan goes back to version {found.version}, and {confirmed} was confirmed",
                f"type {found.version} where it is what you want",
            )
        return found
