"""The command around a check of the user's own functions, which startup runs as a process of its own."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from state.config.loading import load
from state.config.settings import Settings
from state.errors import SpringtideError, of_disk
from state.process.quiet_stderr import own_stderr, quiet_stderr, quiet_tensorflow

Check = Callable[[Settings, Path | None], str]

OPTIONS_READ = "options_read.json"
"""File next to a kept graph with the names in `model.options` that the preprocessing read."""


def run_check(argv: Sequence[str] | None, option: str, check: Check) -> int:
    """Prints what `check` says, or its complaint to the standard error; returns the exit code.

    Args:
        argv: The command line: settings and `option DIR`; None for that of the process.
        option: How a directory is named on the command line, such as `--keep`.
        check: Takes the settings and that directory, and says in one line what it found.
    """
    quiet_tensorflow(os.environ)
    errors = own_stderr()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(option, dest="folder", type=Path)
    asked, flags = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    try:
        settings = load(flags, os.environ)
        with quiet_stderr():
            said = check(settings, asked.folder)
    except (SpringtideError, OSError) as problem:
        error = of_disk(problem)
        print(error, file=errors)
        return error.exit_code
    print(said)
    return 0
