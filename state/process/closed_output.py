"""A command whose reader has had enough, as `head` has after ten lines, ends in silence."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def while_read(main: Callable[[], int]) -> int:
    """Runs a command; returns its exit code, and 0 where what reads its output went away.

    Args:
        main: Prints to the standard output.
    """
    try:
        code = main()
        # Here, where a broken pipe can be caught, and not when Python ends.
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code
