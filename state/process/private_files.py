"""Files that hold what users did are their owner's alone: 0600, and 0700 for directories."""

from __future__ import annotations

import os
from pathlib import Path

OTHERS = 0o007


def keep_private() -> None:
    """From now on this process and its children make files that nobody else can read. Each `main` calls it first."""
    os.umask(0o077)


def close_to_others(directory: Path) -> None:
    """Takes the rights of all other users from a directory that an earlier release made readable by everybody.

    One that its owner opened to a group stays so; one of another owner stays as it is.
    """
    mode = directory.stat().st_mode & 0o777
    if mode & OTHERS and directory.stat().st_uid == os.getuid():
        directory.chmod(0o700)


def others_may(path: Path) -> bool:
    """Whether others than this process's user may read or write a file that holds a secret.

    A file of root's that is read by a group of ours is no such: so Kubernetes gives a secret to a user who is not root, and
    nobody else is in that group.

    Raises:
        OSError: It is not there.
    """
    status = path.stat()
    mounted = status.st_uid == 0 and os.geteuid() != 0 and status.st_gid in {os.getegid(), *os.getgroups()}
    return bool(status.st_mode & (0o037 if mounted else 0o077))
