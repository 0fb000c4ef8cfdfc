"""Keeps the lookalike lists that workers read: rebuilt periodically by a child, removed at once if control changes."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from deploy.children.ending import die_with
from state.config.settings import Settings
from state.disk import files as durable
from state.layout import LOOKALIKES
from state.process.user_code import for_children

EVERY_S = 3600.0
_log = logging.getLogger(__name__)


def aside(settings: Settings) -> Path:
    """Returns the temporary directory where a child writes lists."""
    return settings.serving_dir / f"{LOOKALIKES}.new"


class LookalikeLists:
    """The lookalike lists of one host; used by the main thread, which keeps members.

    Args:
        settings: Settings of the loop; without `segments.lookalikes` there are no lists.
        clock_s: A monotonic clock.
    """

    def __init__(self, settings: Settings, clock_s: Callable[[], float]) -> None:
        self._settings, self._clock_s = settings, clock_s
        self._folder, self._aside = settings.serving_dir / LOOKALIKES, aside(settings)
        self._wanted = bool(settings.segments.lookalikes)
        self._child: subprocess.Popen[bytes] | None = None
        self._due_s = clock_s()
        # Control may have changed while this process did not run.
        self.drop()

    def tick(self) -> None:
        """Publishes the lists of a finished child, and starts the next child if it is due.

        Raises:
            OSError: The operating system refused; existing lists stay, and a later call tries again.
        """
        if not self._wanted:
            return
        if self._child is not None:
            code = self._child.poll()
            if code is None:
                return
            self._child = None
            if code == 0:
                self._place()
            else:
                _log.error("listing lookalikes failed with exit code %d; the lists stay as they are", code)
        if self._clock_s() >= self._due_s:
            self._due_s = self._clock_s() + EVERY_S
            shutil.rmtree(self._aside, ignore_errors=True)
            environment = for_children({**os.environ, **self._settings.environment()})
            command = [sys.executable, "-m", "deploy.segments.listing"]
            self._child = subprocess.Popen(command, env=environment, preexec_fn=die_with(os.getpid()))

    def drop(self) -> None:
        """Removes all lists and stops the child; the next tick starts again."""
        self.close()
        for folder in (self._folder, self._aside):
            shutil.rmtree(folder, ignore_errors=True)
        self._due_s = self._clock_s()

    def close(self) -> None:
        """Kills the child; its unfinished lists are not used."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None

    def _place(self) -> None:
        self._folder.mkdir(exist_ok=True)
        durable.exchange(self._aside, self._folder)
        durable.sync_directory(self._folder.parent)
        shutil.rmtree(self._aside, ignore_errors=True)
        _log.info("the lookalikes of segments are listed anew")
