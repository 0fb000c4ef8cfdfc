"""Ends a process, and tests whether one has ended."""

from __future__ import annotations

import subprocess

import psutil


def end(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Ends a child and waits for it: SIGTERM, then SIGKILL after the timeout. The child may have ended before.

    Args:
        process: The child.
        timeout_s: How long it may take to end after SIGTERM.
    """
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def has_ended(process: psutil.Process) -> bool:
    """Returns whether a process has ended; a zombie, which its parent has not waited for, counts as ended."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
