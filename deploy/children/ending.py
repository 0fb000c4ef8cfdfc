"""How a process is ended, and when it has."""

from __future__ import annotations

import subprocess

import psutil


def end(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Returns once the child has ended: SIGTERM, and SIGKILL where it does not end in time; it may have ended before.

    Args:
        process: The child.
        timeout_s: How long it may take.
    """
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def has_ended(process: psutil.Process) -> bool:
    """Whether a process has; one that its parent has not waited for is still listed, as a zombie, and does nothing."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
