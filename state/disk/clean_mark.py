"""The marker file of a store that is not synced at each commit: whether it was closed cleanly, and the last boot id."""

from __future__ import annotations

from pathlib import Path

import msgspec

from state.disk import documents
from state.disk import files as durable

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class CleanMark(msgspec.Struct, frozen=True):
    """The content of a marker file: whether the store was closed cleanly, and the boot id when it was last open."""

    clean: bool
    boot_id: str

    def trusts(self, boot: str) -> bool:
        """Whether the store has all its pages: it was closed cleanly, or was last open under this boot id."""
        return self.clean or self.boot_id == boot


def boot_id() -> str:
    """The boot id of this machine."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else "unknown"


def read(path: Path) -> CleanMark | None:
    """Reads the marker at `path`; None if there is none. A damaged file gives a marker that no boot id trusts."""
    if not path.exists():
        return None
    try:
        return documents.decode(path.read_bytes(), CleanMark)
    except msgspec.MsgspecError:
        return CleanMark(False, "")


def write(path: Path, mark: CleanMark) -> None:
    """Replaces the marker; durable when this returns."""
    durable.replace(path, msgspec.json.encode(mark))
