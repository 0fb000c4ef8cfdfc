"""Puts a history store that was built aside in the place of the old one, however often that is cut short.

    histories             the store that the stream opens
    histories.rebuilding  being built; worthless after a crash
    histories.rebuilt     complete, synced and closed: it only waits for its place
    histories.bad<n>      what it took the place of; nothing opens it, remove it when you like

Both the stream and the rebuild call `finish` under the directory's lock
before they look at `histories`, so that nobody starts on an empty store
between two renames.
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
    """An empty place to build a store in; what an earlier attempt left there is removed."""
    place = folder / REBUILDING
    if place.exists():
        shutil.rmtree(place)
    return place


def promise(folder: Path) -> None:
    """Declares the store under `histories.rebuilding`, closed and synced, complete: from now on it will be taken."""
    durable.sync_tree(folder / REBUILDING)
    (folder / REBUILDING).rename(folder / REBUILT)
    durable.sync_directory(folder)
    killpoints.reach("rebuild.promised")


def finish(folder: Path) -> Path | None:
    """Takes a complete store into use, if there is one.

    1. The old store, out of memory if it lies there, is set aside under a name that nothing opens.
    2. The new one gets its place.

    Returns:
        Where the old store is now; None where there was nothing to take or no old store.
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
    """Whether the store was open when the machine or its container went down, so that nobody may open it; cheap.

    A store that is not there yet is not lost, nor is one that an earlier release left without a mark.
    """
    place = folder / HISTORIES
    if memory_place.target_of(place) is not None and not place.exists():
        return True
    mark = clean_mark.read(place / MARK)
    return mark is not None and not mark.trusts(clean_mark.boot_id())


def set_aside(place: Path) -> Path | None:
    """Gives a store, out of memory if it lies there, a name that nothing opens; None where there is none."""
    bring_back(place)
    if not place.exists():
        return None
    aside = next(path for number in itertools.count(1) if not (path := place.parent / f"{BAD}{number}").exists())
    place.rename(aside)
    durable.sync_directory(place.parent)
    return aside
