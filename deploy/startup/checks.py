"""Checks before the loop starts: Python and disk; each failure is one clear error.

This file imports nothing that needs a supported Python, so that an older Python reports an error and not a traceback.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from state.errors import SettingsError, StoreFull, UnusableDisk

PYTHONS = ((3, 11), (3, 12))
LEAST_FREE_BYTES = 256 * 2**20


def require_python(version: Sequence[object]) -> None:
    """Checks that Python is one for which all pinned packages exist.

    Args:
        version: Major and minor number first, such as `sys.version_info`.

    Raises:
        SettingsError: The version is another one.

    >>> require_python((3, 11, 7))
    """
    if tuple(version[:2]) not in PYTHONS:
        own, *wanted = (".".join(map(str, numbers[:2])) for numbers in (version, *PYTHONS))
        do = f"install Python {' or '.join(wanted)} and run `make clean run`"
        raise SettingsError(f"Python {own} is not supported", do)


def require_directory(directory: Path) -> None:
    """Checks that the state directory exists or can be created, and can be written.

    Raises:
        UnusableDisk: The directory cannot be used; the message says why.
    """
    do = "choose another directory with --state or paths.state"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UnusableDisk(f"the state directory {directory} is a file", do) from None
    except OSError as problem:
        raise UnusableDisk(f"the state directory {directory} cannot be made ({problem.strerror})", do) from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UnusableDisk(f"the state directory {directory} cannot be written", f"correct its access rights, or {do}")


def require_disk(directory: Path, least_bytes: int = LEAST_FREE_BYTES) -> int:
    """Returns the free bytes of the disk where `directory` is or will be.

    Raises:
        StoreFull: Fewer than `least_bytes` are free.
    """
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if _can_be_seen(path))
    free = shutil.disk_usage(existing).free
    if free < least_bytes:
        raise StoreFull(
            f"{directory}: {free / 2**30:.2f} GiB free and {least_bytes / 2**30:.2f} GiB needed",
            "free some space, or set paths.state to a larger disk",
        )
    return free


def _can_be_seen(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:
        return False
