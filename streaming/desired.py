"""What control asks of the stream: which clicks are left out, and in which epoch of the training log it writes.

A stream without a registry leaves no clicks out, and continues in the epoch of its histories. A running stream polls
control ten times a second. When control changes, the job ends in order and is opened again in the same process, as
after a restart.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from state.errors import StoreError
from state.features.mask import Mask
from state.registry.control import Control
from state.registry.controls import ControlPoll
from state.registry.log_line import WHOLE, LogLine

LOOK_S = 0.1


@dataclass(frozen=True)
class Desired:
    """What control asks of the stream.

    Attributes:
        line: The branch of the training log; the stream writes its last epoch.
        mask: The clicks that are left out.
    """

    line: LogLine
    mask: Mask = Mask.NONE

    @property
    def log_epoch(self) -> int:
        """The epoch of the training log that is written.

        >>> from state.registry.log_line import WHOLE
        >>> Desired(WHOLE).log_epoch
        1
        """
        return self.line[-1].epoch


NOTHING_DESIRED = Desired(WHOLE)


class ControlWatch:
    """Polls control for one shard. Not thread-safe.

    Args:
        registry: The registry's directory, which need not exist.
        own: The branch that the histories belong to.
        clock: Monotonic clock in seconds.

    Raises:
        RegistryError: Control cannot be read.
        StoreError: The histories have a later epoch of the training log than control knows.
    """

    def __init__(self, registry: Path, own: LogLine, clock: Callable[[], float] = time.monotonic) -> None:
        self._own, self._clock = own, clock
        self._control = ControlPoll(registry)
        self._looked_s, self._again_s = float("-inf"), float("inf")
        self.desired = self._wanted(self._control.read())
        if self.desired.log_epoch < own[-1].epoch:
            raise StoreError(
                f"the histories are of epoch {own[-1].epoch} of the training log, and control in {registry} knows "
                f"{self.desired.log_epoch}: it is another registry, or an older copy of it",
                "restore the registry, or run `springtide rebuild-history`, which makes the histories of its epoch",
            )

    def open_again_in(self, seconds: float | None) -> None:
        """Schedules the shard to be opened again in `seconds`, whatever control asks for; None cancels it."""
        self._again_s = float("inf") if seconds is None else self._clock() + seconds

    def changed(self) -> bool:
        """Whether control has changed, or the shard is to be opened again; polls control at most once per `LOOK_S`."""
        now_s = self._clock()
        if now_s >= self._again_s:
            return True
        if now_s - self._looked_s < LOOK_S:
            return False
        self._looked_s = now_s
        return self._wanted(self._control.poll()) != self.desired

    def _wanted(self, control: Control | None) -> Desired:
        return Desired(self._own) if control is None else Desired(control.log, control.mask)
