"""What lies at a place for backups, see `state/places`, and what is said where a file of the system cannot be read.

objects/<first two digits>/<sha256>   pieces of files, zstd     deploy/backup/objects.py
backups/<id>.json                     what makes one up         deploy/backup/documents.py
locks/<owner>.json                    who writes here now       deploy/backup/lease.py
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from state.errors import BackupError, reason_of

OBJECTS, BACKUPS, LOCKS = "objects", "backups", "locks"


@contextmanager
def usable(told: str, doing: str) -> Iterator[None]:
    """Turns what the operating system refuses into an error of ours; a file that is not there stays one.

    Raises:
        FileNotFoundError: A file is not there.
        BackupError: The disk is full or read-only, or rights are missing.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BackupError(
            f"{told} cannot {doing} ({reason_of(error)})", "free space or correct its access rights, and repeat it"
        ) from error
