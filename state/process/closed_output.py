"""Ends a command silently when the reader of its output stops reading, as `head` does after ten lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def while_read(main: Callable[[], int]) -> int:
    """Runs a command; returns its exit code, or 0 if the reader of its output has closed the pipe.

    Args:
        main: The command, which prints to standard output.
    """
    try:
        code = main()
        # Flush here, where a broken pipe can be caught, rather than when Python ends.
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code
