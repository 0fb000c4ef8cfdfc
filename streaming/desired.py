"""What control asks of the stream: which clicks are left out, and in which epoch of the training log it writes.

A stream without a registry beside it leaves nothing out, and goes on in the
epoch that its histories are in. One that runs looks at control ten times a
second; where it asks for something else the job ends in order and is opened
again, as after a restart, in the same process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from state import layout
from state.errors import RegistryError, StoreError
from state.features.mask import Mask
from state.process.said_once import SaidOnce
from state.registry.controls import Controls
from state.registry.log_line import WHOLE, LogLine

LOOK_S = 0.1
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Desired:
    """What control asks of the stream.

    Attributes:
        line: The line of the training log; the stream writes its last epoch.
        mask: The clicks that are left out.
    """

    line: LogLine
    mask: Mask = Mask.NONE

    @property
    def log_epoch(self) -> int:
        """The epoch of the log that is written.

        >>> from state.registry.log_line import WHOLE
        >>> Desired(WHOLE).log_epoch
        1
        """
        return self.line[-1].epoch


NOTHING_DESIRED = Desired(WHOLE)


class ControlWatch:
    """Looks at control for one shard. One thread.

    Args:
        registry: The registry's directory, which need not be there.
        own: The line that the histories are on.
        clock: Seconds that never go back.

    Raises:
        RegistryError: Control cannot be read.
        StoreError: The histories are of a later epoch of the log than control knows.
    """

    def __init__(self, registry: Path, own: LogLine, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._own, self._clock = registry, own, clock
        self._controls: Controls | None = None
        self._say = SaidOnce(logger.warning)
        self._looked_s = float("-inf")
        self.desired = self._read()
        if self.desired.log_epoch < own[-1].epoch:
            raise StoreError(
                f"the histories are of epoch {own[-1].epoch} of the training log, and control in {registry} knows "
                f"{self.desired.log_epoch}: it is another registry, or an older copy of it",
                "restore the registry, or run `springtide rebuild-history`, which makes the histories of its epoch",
            )

    def changed(self) -> bool:
        """Whether control asks for something else than it did; looks at most each `LOOK_S`."""
        now_s = self._clock()
        if now_s - self._looked_s < LOOK_S:
            return False
        self._looked_s = now_s
        try:
            return self._read() != self.desired
        except RegistryError as error:
            self._say(f"{error}; clicks are taken as before")
            return False

    def _read(self) -> Desired:
        if self._controls is None and (self._path / layout.CONTROL).is_dir():
            self._controls = Controls(self._path)
        control = None if self._controls is None else self._controls.control()
        return Desired(self._own) if control is None else Desired(control.log, control.mask)
