"""Control as a process sees it that goes on without it: where there is no registry, or it cannot be read, nothing changes."""

from __future__ import annotations

import logging
from pathlib import Path

from state import layout
from state.errors import RegistryError
from state.process.said_once import SaidOnce
from state.registry.control import Control
from state.registry.controls import Controls

logger = logging.getLogger(__name__)


class ControlLook:
    """Looks at control. One thread.

    Args:
        registry: The registry's directory, which need not be there.
    """

    def __init__(self, registry: Path) -> None:
        self._path = registry
        self._controls: Controls | None = None
        self._seen: Control | None = None
        self._say = SaidOnce(logger.warning)

    def look(self) -> Control | None:
        """The newest control; the last one seen where it cannot be read, which is said once; None where there is none."""
        try:
            self._seen = self.read()
        except RegistryError as error:
            self._say(f"{error}; it goes on as it is")
        return self._seen

    def read(self) -> Control | None:
        """The newest control; None where there is none.

        Raises:
            RegistryError: It cannot be read.
        """
        if self._controls is None:
            if not (self._path / layout.CONTROL).is_dir():
                return None
            self._controls = Controls(self._path)
        return self._controls.control()
