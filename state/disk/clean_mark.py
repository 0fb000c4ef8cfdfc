"""The mark beside a store that is not synced at each commit: whether it was closed in order, and under which start of the machine.

After kill -9 such a store is whole, since the kernel still writes its pages.
After a power cut pages may be missing in any order; then the mark names
another start of the machine.
"""

from __future__ import annotations

import json
from pathlib import Path

from state.disk import files as durable

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Which start of the machine this is."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else "unknown"


def is_trusted(mark: bytes, boot: str) -> bool:
    """Whether a store with this mark has all its pages: closed in order, or open under this very start of the machine.

    >>> is_trusted(b'{"clean": false, "boot_id": "a"}', "a"), is_trusted(b'{"clean": false, "boot_id": "a"}', "b")
    (True, False)
    >>> is_trusted(b'{"cle', "a")
    False
    """
    try:
        fields = json.loads(mark)
        return bool(fields["clean"]) or fields["boot_id"] == boot
    except (ValueError, KeyError, TypeError):
        return False


def write(path: Path, clean: bool) -> None:
    """Replaces the mark; durable when this returns."""
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    durable.write(temporary, json.dumps({"clean": clean, "boot_id": boot_id()}).encode())
    temporary.replace(path)
    durable.sync_directory(path.parent)
