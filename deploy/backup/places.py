"""What lies at a place for backups, see `state/places`, and what is said where a file of the system cannot be read.

objects/<first two digits>/<sha256>   pieces of files, zstd     deploy/backup/objects.py
backups/<id>.json                     what makes one up         deploy/backup/documents.py
locks/<owner>.json                    who writes here now       deploy/backup/lease.py
"""

from __future__ import annotations

from functools import partial

from state.errors import BackupError
from state.places import place

OBJECTS, BACKUPS, LOCKS = "objects", "backups", "locks"

usable = partial(place.usable, failed=BackupError)
"""As for any place; what the operating system refuses is a `BackupError`."""
