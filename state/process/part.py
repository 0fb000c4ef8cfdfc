"""Entry points: of a process (private files, log lines under its name, settings, exit code), and of a check."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from state.config.loading import load
from state.config.settings import Settings
from state.errors import SpringtideError, of_disk
from state.process import log_lines
from state.process.ending import reported
from state.process.private_files import keep_private
from state.process.quiet_stderr import own_stderr, quiet_stderr, quiet_tensorflow

Work = Callable[[], int | None]
Check = Callable[[Settings, Path | None], str]

OPTIONS_READ = "options_read.json"
"""File next to a kept graph with the names of the `model.options` that the preprocessing read."""


def run_part(
    name: str, work: Callable[[Settings], int | None], argv: Sequence[str] | None, logger: logging.Logger
) -> int:
    """Runs a process whose command line has only settings, see `run_process`."""

    def start(words: Sequence[str]) -> tuple[Settings, Work]:
        settings = load(words)
        return settings, lambda: work(settings)

    return run_process(name, start, argv, logger)


def run_process(
    name: str,
    start: Callable[[Sequence[str]], tuple[Settings, Work]],
    argv: Sequence[str] | None,
    logger: logging.Logger,
    stream: TextIO | None = None,
    level: int = logging.INFO,
) -> int:
    """Runs a process: private files, log lines under its name, settings, and one line for the error that ends it.

    Returns the exit code.

    Args:
        name: Name of the process in its log lines.
        start: Parses the command line; returns the settings and the work, which returns the exit code, None for 0.
        argv: The command line; None for that of this process.
        logger: Logs the error that ended the process.
        stream: Where log lines are written; None for standard error.
        level: The lowest level that is logged.
    """
    keep_private()
    log_lines.begin(name, stream, level)

    def run() -> int | None:
        settings, work = start(list(sys.argv[1:] if argv is None else argv))
        log_lines.follow(settings.logs)
        return work()

    try:
        return reported(run, logger)
    except KeyboardInterrupt:
        logger.error("stopped")
        return 1


def run_command(name: str, work: Callable[[TextIO], int | None]) -> int:
    """Runs a command that loads TensorFlow, whose chatter is kept from the stream that `work` gets for standard error.

    An error is written to it in one line. Returns the exit code.
    """
    with own_stderr() as errors:
        log_lines.begin(name, errors, logging.WARNING)
        quiet_tensorflow(os.environ)
        try:
            return work(errors) or 0
        except (SpringtideError, OSError) as problem:
            error = of_disk(problem)
            print(f"springtide: {error}", file=errors, flush=True)
            return error.exit_code


def run_check(argv: Sequence[str] | None, option: str, check: Check) -> int:
    """Runs a check on the settings and the directory that `option`, such as `--keep`, names; returns the exit code.

    Prints the check's result, one line, or its error to standard error.
    """
    quiet_tensorflow(os.environ)
    errors = own_stderr()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(option, dest="folder", type=Path)
    args, flags = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    try:
        settings = load(flags, os.environ)
        with quiet_stderr():
            result = check(settings, args.folder)
    except (SpringtideError, OSError) as problem:
        error = of_disk(problem)
        print(error, file=errors)
        return error.exit_code
    print(result)
    return 0
