"""Location and size of the stores with random writes, and why a store is on disk instead of in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from state import layout
from state.config.settings import Settings
from state.disk import memory_place as place


def look(settings: Settings) -> dict[str, Any] | None:
    """Returns the location of this host's row store as JSON values; None if there is none."""
    return _look(settings, settings.serving_dir / layout.ROWS, settings.serving.rows_dir, "serving starts again")


def look_at_histories(settings: Settings) -> list[dict[str, Any]]:
    """Returns the locations of the histories of stream and serving; on disk while no process writes them."""
    links = [*layout.streams(settings.state_dir), settings.serving_dir / layout.HISTORIES]
    found = ((link, _look(settings, link, "", "their writer starts")) for link in links)
    return [{"name": f"{link.parent.name}/{link.name}", **one} for link, one in found if one is not None]


def as_text(stored: Mapping[str, Any]) -> tuple[str, str]:
    """Formats a location for `springtide status`: a keyword and a description.

    >>> as_text({"path": "state/serving/rows.disk", "in_memory": False, "bytes": 5e6, "why": "/dev/shm is missing"})
    ('on disk', 'state/serving/rows.disk, 5 MB; /dev/shm is missing')
    """
    text = f"{stored['path']}, {stored['bytes'] / 1e6:,.0f} MB"
    return "in memory" if stored["in_memory"] else "on disk", "; ".join(filter(None, (text, stored["why"])))


def _look(settings: Settings, link: Path, asked: str, moves: str) -> dict[str, Any] | None:
    found, memory = place.current(link), settings.storage.memory_dir
    if found is None:
        return None
    # If a setting names a directory, or memory is disabled, the location is intended and needs no reason.
    settled = found.in_memory or asked or not memory
    return {
        "path": str(found.path),
        "in_memory": found.in_memory,
        "bytes": place.size(found.path),
        "why": ""
        if settled
        else place.lack(link, memory) or f"{memory} has room now, and they move there when {moves}",
    }
