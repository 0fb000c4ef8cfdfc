"""Lets a process run after the stream, the trainer and serving on a busy machine."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

NICENESS = 10


def run_in_background() -> None:
    """Raises the niceness of this process, and of its session if it leads one.

    Linux weighs sessions before processes where `kernel.sched_autogroup_enabled` is set.
    """
    niceness = os.nice(NICENESS)
    if os.getsid(0) == os.getpid():
        with suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(niceness))
