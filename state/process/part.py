"""What the processes of all parts begin with: private files, log lines under their name, and the settings of their command line."""

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
    """Does the work of a process; an error that ends it is said in one line.

    Args:
        name: Of the part, in its log lines.
        work: Does it; what it returns is the exit code, None for 0.
        argv: The flags; None for those of this process.
        logger: Says what ended it.

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
