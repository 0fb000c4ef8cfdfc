"""Replaces a history store with one that was built next to it, and survives a crash at any point.

    histories             the store that the stream opens
    histories.rebuilding  being built; worthless after a crash
    histories.rebuilt     complete, synced and closed; waits to replace the old store
    histories.bad<n>      a replaced store; nothing opens it, remove it when you like

Both the stream and the rebuild call `finish` under the directory's lock before they open `histories`. So neither starts
with an empty store between two renames.
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

from state.disk import clean_mark, memory_place
from state.disk import files as durable
from state.disk.memory_store import bring_back
from state.layout import HISTORIES, MARK
from state.process import killpoints

REBUILDING = f"{HISTORIES}.rebuilding"
REBUILT = f"{HISTORIES}.rebuilt"
BAD = f"{HISTORIES}.bad"


def begin(folder: Path) -> Path:
    """Returns an empty path to build a store at; removes the remains of an earlier attempt."""
    place = folder / REBUILDING
    if place.exists():
        shutil.rmtree(place)
    return place


def promise(folder: Path) -> None:
    """Declares the closed and synced store `histories.rebuilding` complete: from now on it will replace the old one."""
    durable.sync_tree(folder / REBUILDING)
    (folder / REBUILDING).rename(folder / REBUILT)
    durable.sync_directory(folder)
    killpoints.reach("rebuild.promised")


def finish(folder: Path) -> Path | None:
    """Puts a complete store into use, if there is one.

    1. The old store is moved out of memory if it is there, and set aside under a name that nothing opens.
    2. The new store takes its path.

    Returns:
        Where the old store is now; None if there was no complete store or no old one.
    """
    rebuilt, place = folder / REBUILT, folder / HISTORIES
    if not rebuilt.exists():
        return None
    # 1.
    aside = set_aside(place)
    killpoints.reach("rebuild.aside")
    # 2.
    rebuilt.rename(place)
    durable.sync_directory(folder)
    return aside


def is_lost(folder: Path) -> bool:
    """Whether the store was open when the machine or its container went down, so that it must not be opened; cheap.

    A store that does not exist yet is not lost, nor is one that an earlier release left without a marker.
    """
    place = folder / HISTORIES
    if memory_place.target_of(place) is not None and not place.exists():
        return True
    mark = clean_mark.read(place / MARK)
    return mark is not None and not mark.trusts(clean_mark.boot_id())


def set_aside(place: Path) -> Path | None:
    """Renames a store to a name that nothing opens, after moving it out of memory; None if there is none."""
    bring_back(place)
    if not place.exists():
        return None
    aside = next(path for number in itertools.count(1) if not (path := place.parent / f"{BAD}{number}").exists())
    place.rename(aside)
    durable.sync_directory(place.parent)
    return aside
