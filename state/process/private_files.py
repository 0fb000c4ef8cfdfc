"""Keeps files with user data private to their owner: mode 0600, and 0700 for directories."""

from __future__ import annotations

import os
from pathlib import Path

OTHERS = 0o007


def keep_private() -> None:
    """Sets the umask: nobody else can read new files of this process or its children. Each `main` calls it first."""
    os.umask(0o077)


def close_to_others(directory: Path) -> None:
    """Removes the permissions of other users from a directory that an earlier release made world-readable.

    A directory that its owner opened to a group keeps its mode, and so does one of another owner.
    """
    mode = directory.stat().st_mode & 0o777
    if mode & OTHERS and directory.stat().st_uid == os.getuid():
        directory.chmod(0o700)


def others_may(path: Path) -> bool:
    """Whether users other than this process's user may read or write a file that holds a secret.

    A file of root may be readable by its group if that is one of ours. Kubernetes mounts a secret this way for a user
    other than root, and nobody else is in that group.

    Raises:
        OSError: The file does not exist.
    """
    status = path.stat()
    mounted = status.st_uid == 0 and os.geteuid() != 0 and status.st_gid in {os.getegid(), *os.getgroups()}
    return bool(status.st_mode & (0o037 if mounted else 0o077))
