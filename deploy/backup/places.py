"""Layout of a backup location (`state/places`), and the error for files that cannot be read.

objects/<first two digits>/<sha256>   pieces of files, zstd     deploy/backup/objects.py
backups/<id>.json                     document of a backup      deploy/backup/documents.py
locks/<owner>.json                    who writes here now       deploy/backup/lease.py
"""

from __future__ import annotations

from functools import partial

from state.errors import BackupError
from state.places import place

OBJECTS, BACKUPS, LOCKS = "objects", "backups", "locks"

usable = partial(place.usable, failed=BackupError)
"""`state.places.place.usable` that raises a `BackupError` for an error of the operating system."""
