"""The mark beside a store that is not synced at each commit: whether it was closed in order, and under which start of the machine.

After kill -9 such a store is whole, since the kernel still writes its pages.
After a power cut pages may be missing in any order; then the mark names
another start of the machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from state.disk import files as durable

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class CleanMark(NamedTuple):
    """What a mark says.

    Attributes:
        clean: Whether the store was closed in order.
        boot_id: Under which start of the machine it was last open.
    """

    clean: bool
    boot_id: str

    def trusts(self, boot: str) -> bool:
        """Whether the store has all its pages: closed in order, or open under this very start of the machine.

        >>> CleanMark(False, "a").trusts("a"), CleanMark(False, "a").trusts("b"), CleanMark(True, "a").trusts("b")
        (True, False, True)
        """
        return self.clean or self.boot_id == boot


def boot_id() -> str:
    """Which start of the machine this is."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else "unknown"


def parse(text: bytes) -> CleanMark:
    """The mark in a file; one that no start of the machine trusts where the file is damaged.

    >>> parse(b'{"clean": true, "boot_id": "a"}'), parse(b'{"cle').trusts("a")
    (CleanMark(clean=True, boot_id='a'), False)
    """
    try:
        fields = json.loads(text)
        return CleanMark(bool(fields["clean"]), str(fields["boot_id"]))
    except (ValueError, KeyError, TypeError):
        return CleanMark(False, "")


def read(path: Path) -> CleanMark | None:
    """The mark at `path`; None where there is none.

    Raises:
        OSError: It cannot be read.
    """
    return parse(path.read_bytes()) if path.exists() else None


def write(path: Path, mark: CleanMark) -> None:
    """Replaces the mark; durable when this returns.

    Raises:
        OSError: It cannot be written.
    """
    durable.replace(path, json.dumps(mark._asdict()).encode())
