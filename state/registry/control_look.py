"""Reads control for a process that keeps running without it: if it is missing or unreadable, nothing changes."""

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
    """Polls control. Use it from one thread only.

    Args:
        registry: The registry's directory, which may not exist.
    """

    def __init__(self, registry: Path) -> None:
        self._path = registry
        self._controls: Controls | None = None
        self._seen: Control | None = None
        self._say = SaidOnce(logger.warning)

    def look(self) -> Control | None:
        """The newest control; None if there is none. If it cannot be read, warns once and returns the last one read."""
        try:
            self._seen = self.read()
        except RegistryError as error:
            self._say(f"{error}; it goes on as it is")
        return self._seen

    def read(self) -> Control | None:
        """The newest control; None if there is none.

        Raises:
            RegistryError: It cannot be read.
        """
        if self._controls is None:
            if not (self._path / layout.CONTROL).is_dir():
                return None
            self._controls = Controls(self._path)
        return self._controls.control()
