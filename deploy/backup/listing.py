"""Lists, reads, checks and prunes the backups of a location."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from deploy.backup import documents
from deploy.backup.documents import Backup
from deploy.backup.lease import Lease
from deploy.backup.objects import Objects, damaged, digests, name_of
from deploy.backup.places import BACKUPS
from state.errors import BackupError, DamagedBackup
from state.places.place import FilePlace
from state.process import killpoints


class Pruned(NamedTuple):
    """What `prune` removed.

    Attributes:
        backups: How many backups.
        objects: How many objects that no remaining backup uses.
    """

    backups: int
    objects: int


def ids(place: FilePlace) -> list[str]:
    """Returns the ids of all backups of a location, oldest first."""
    found = [name.removesuffix(".json") for name in place.names(BACKUPS)]
    return [one for one in found if documents.is_id(one)]


def backup(place: FilePlace, wanted: str = "") -> Backup:
    """Reads the document of a backup; of the newest one if `wanted` is empty.

    Raises:
        BackupError: There is no backup, or none with this id.
        DamagedBackup: The document fails its digest.
    """
    known = ids(place)
    if not known:
        raise BackupError(
            f"{place.told} has no backup", "look whether the place is right: `springtide backup TO --list`"
        )
    found = wanted or known[-1]
    if found not in known:
        raise BackupError(f"{place.told} has no backup {found}", f"take one of {', '.join(known[-5:])}")
    name = f"{BACKUPS}/{found}.json"
    try:
        return documents.decode(place.read(name))
    except FileNotFoundError:
        raise damaged(name, place.told, " is missing") from None
    except ValueError as error:
        raise damaged(name, place.told, f" is damaged ({error})") from error


def newest(place: FilePlace) -> Backup | None:
    """Returns the newest backup of a location whose document can be read; None if there is none."""
    for one in reversed(ids(place)):
        try:
            return backup(place, one)
        except DamagedBackup:
            continue
    return None


def prune(place: FilePlace, keep: int) -> Pruned:
    """Removes all but the newest `keep` backups, and the objects that no remaining backup uses.

    1. Removes the documents, oldest first. A backup without its document no longer counts.
    2. Removes the objects. After a crash before this step, unused objects remain until the next prune.

    Raises:
        LockHeld: Another process writes to the location.
        DamagedBackup: A remaining backup cannot be read, so that its objects are unknown; no object was removed.
    """
    with Lease(place) as lease:
        known = ids(place)
        staying = [backup(place, one) for one in known[-keep:]]
        # 1.
        for one in known[:-keep]:
            place.remove(f"{BACKUPS}/{one}.json")
        killpoints.reach("prune.documents")
        # 2.
        named = {piece for one in staying for file in one.files for piece in file.pieces}
        idle = [digest for digest in digests(place) if digest not in named]
        for digest in idle:
            lease.refresh()
            place.remove(name_of(digest))
    return Pruned(len(known[:-keep]), len(idle))


def check(place: FilePlace, wanted: Backup, said: Callable[[int], None]) -> None:
    """Reads a whole backup and verifies every digest.

    Args:
        place: Where the backup is stored.
        wanted: The backup.
        said: Called with the number of bytes of each piece read.

    Raises:
        DamagedBackup: Something is missing or fails its digest; the message names it.
    """
    objects = Objects(place, listed=False)
    for file in wanted.files:
        for piece in objects.read(file):
            said(len(piece))
