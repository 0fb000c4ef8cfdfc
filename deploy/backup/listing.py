"""Which backups a place has, and what goes where only the newest are to stay."""

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
    """What went.

    Attributes:
        backups: How many backups.
        objects: How many objects that none of those left names.
    """

    backups: int
    objects: int


def ids(place: FilePlace) -> list[str]:
    """The backups of a place, oldest first."""
    found = [name.removesuffix(".json") for name in place.names(BACKUPS)]
    return [one for one in found if documents.is_id(one)]


def backup(place: FilePlace, wanted: str = "") -> Backup:
    """A backup of a place; the newest where none is named.

    Raises:
        BackupError: There is none, or none of this id.
        DamagedBackup: Its document fails its digest.
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
    """The newest backup of a place whose document can be read; None where there is none."""
    for one in reversed(ids(place)):
        try:
            return backup(place, one)
        except DamagedBackup:
            continue
    return None


def prune(place: FilePlace, keep: int) -> Pruned:
    """Removes all but the newest `keep` backups, and the objects that none of those left names.

    1. Documents, oldest first: from here on they are no backups any more.
    2. Objects; a crash before leaves some that nobody names, and the next one removes them.

    Raises:
        LockHeld: A backup is made there.
        DamagedBackup: One that stays cannot be read, so that nobody knows what it names; no object was removed.
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
    """Reads all of a backup.

    Args:
        place: Where it lies.
        wanted: Which one.
        said: Told how many bytes were read, again and again.

    Raises:
        DamagedBackup: Something is missing or fails its digest; the message names it.
    """
    objects = Objects(place, listed=False)
    for file in wanted.files:
        for piece in objects.read(file):
            said(len(piece))
