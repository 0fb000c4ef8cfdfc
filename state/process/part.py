"""Entry point shared by all processes: private files, log lines under the process's name, command-line settings."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

from state.config.loading import load
from state.config.settings import Settings
from state.process import log_lines
from state.process.ending import reported
from state.process.private_files import keep_private


def run_part(
    name: str, work: Callable[[Settings], int | None], argv: Sequence[str] | None, logger: logging.Logger
) -> int:
    """Loads the settings and runs a process; an error that ends it is logged in one line.

    Args:
        name: Name of the process in its log lines.
        work: Runs the process with its settings. It returns the exit code, None for 0.
        argv: The flags; None for those of this process.
        logger: Logs the error that ended the process.

    Returns:
        The exit code.
    """
    keep_private()
    log_lines.begin(name)

    def loaded() -> int | None:
        settings = load(sys.argv[1:] if argv is None else argv)
        log_lines.follow(settings.logs)
        return work(settings)

    return reported(loaded, logger)
