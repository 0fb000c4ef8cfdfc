"""A background thread that repeats one action, retries when the store or the disk fails, and logs a failure once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from state.errors import RegistryError, UnusablePlace
from state.process.said_once import SaidOnce

RETRY_S, JOIN_S = 1.0, 3.0
_log = logging.getLogger(__name__)


class Repeating:
    """A thread that repeats one action; errors of the object store, the registry and the disk are retried.

    Args:
        name: Name of the thread.
        act: The action. It returns True if there is more to do at once.
        pause_s: Pause between two calls if there is not.
        stop: Event that ends the thread.
        failed: Called with any other error, which ends the thread.
    """

    def __init__(
        self,
        name: str,
        act: Callable[[], bool | None],
        pause_s: float,
        stop: threading.Event,
        failed: Callable[[BaseException], None],
    ) -> None:
        self._act, self._pause_s, self._stop, self._failed = act, pause_s, stop, failed
        self._say = SaidOnce(_log.warning)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def join(self) -> None:
        """Waits for the thread to end. A request that hangs ends with the process."""
        self._thread.join(JOIN_S)

    @property
    def runs(self) -> bool:
        """Whether the thread is alive."""
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._stop.wait(self._once())
        except BaseException as error:
            self._failed(error)
            raise

    def _once(self) -> float:
        """Calls the action; returns how long to wait before the next call."""
        try:
            more = self._act()
        except (UnusablePlace, RegistryError, OSError) as error:
            self._say(f"{error}; it is tried again, and the registry here goes on as it is")
            return RETRY_S
        self._say.clear()
        return 0.0 if more else self._pause_s
