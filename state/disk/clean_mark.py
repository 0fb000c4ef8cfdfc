"""The marker file of a store that is not synced at each commit: whether it was closed cleanly, and the last boot id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from state.disk import files as durable

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class CleanMark(NamedTuple):
    """The content of a marker file: whether the store was closed cleanly, and the boot id when it was last open."""

    clean: bool
    boot_id: str

    def trusts(self, boot: str) -> bool:
        """Whether the store has all its pages: it was closed cleanly, or was last open under this boot id."""
        return self.clean or self.boot_id == boot


def boot_id() -> str:
    """The boot id of this machine."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else "unknown"


def parse(text: bytes) -> CleanMark:
    """Parses a marker file; a damaged file gives a marker that no boot id trusts."""
    try:
        fields = json.loads(text)
        return CleanMark(bool(fields["clean"]), str(fields["boot_id"]))
    except (ValueError, KeyError, TypeError):
        return CleanMark(False, "")


def read(path: Path) -> CleanMark | None:
    """Reads the marker at `path`; None if there is none."""
    return parse(path.read_bytes()) if path.exists() else None


def write(path: Path, mark: CleanMark) -> None:
    """Replaces the marker; durable when this returns."""
    durable.replace(path, json.dumps(mark._asdict()).encode())
