"""Where the rows lie that answers of this host read, what they take, and why they lie on the disk where they do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from state.config.settings import Settings
from state.rows import place

ROOM_NOW = f"{place.MEMORY} has room now, and they move there when serving starts again"


def look(settings: Settings) -> dict[str, Any] | None:
    """The place as JSON values; None where there are no rows."""
    found = place.current(settings.serving_dir)
    if found is None:
        return None
    # Where the setting names a directory, nobody looks for room elsewhere.
    asked = found.in_memory or settings.serving.rows_dir
    return {
        "path": str(found.path),
        "in_memory": found.in_memory,
        "bytes": place.size(found.path),
        "why": "" if asked else place.lack(settings.serving_dir) or ROOM_NOW,
    }


def as_text(stored: Mapping[str, Any]) -> tuple[str, str]:
    """A word and the rest, in words.

    >>> as_text({"path": "state/serving/rows.disk", "in_memory": False, "bytes": 5e6, "why": "/dev/shm is missing"})
    ('on disk', 'state/serving/rows.disk, 5 MB; /dev/shm is missing')
    """
    text = f"{stored['path']}, {stored['bytes'] / 1e6:,.0f} MB"
    return "in memory" if stored["in_memory"] else "on disk", "; ".join(filter(None, (text, stored["why"])))
