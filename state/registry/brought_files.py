"""Reads the files of durable versions, and fetches missing ones from the object store of a shared registry.

In a copy of a shared registry, a version may be an empty folder. A missing file
is read from the object store, checked against its digest and kept. A folder that
the object store no longer has is removed here too.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from state import layout
from state.registry.directory import file_bytes, usable
from state.registry.folders import Folders
from state.registry.manifest import FileEntry
from state.registry.sharing.catalog import mark_of

MANIFEST = "manifest.json"
VERSIONED = (layout.VERSIONS, layout.MERGED, layout.BASES)


def fits(entry: FileEntry, data: bytes) -> bool:
    """Whether these bytes match a file's size and digest.

    >>> fits(FileEntry(hashlib.sha256(b"12").hexdigest(), 2), b"12"), fits(FileEntry("", 2), b"13")
    (True, False)
    """
    return len(data) == entry.bytes and hashlib.sha256(data).hexdigest() == entry.sha256


class BroughtFiles(Folders):
    """The files of one registry's versions, read from this directory or fetched from the object store."""

    @property
    def is_copy(self) -> bool:
        """Whether this directory is a copy whose files can be fetched again."""
        found = self.binding
        return found is not None and found.is_copy

    def manifest_bytes(self, folder: Path) -> bytes:
        """Reads the manifest in a version's folder.

        Raises:
            FileNotFoundError: It exists neither here nor in the object store.
            UnusableRegistry: It cannot be read.
        """
        path = folder / MANIFEST
        try:
            return file_bytes(path)
        except FileNotFoundError:
            if not self._may_be_brought(folder) or (data := self.from_shared(path)) is None:
                self._give_up_copy(folder)
                raise
        self.keep_copy(path, data)
        return data

    def file_here_or_brought(self, path: Path, entry: FileEntry) -> bytes | None:
        """Reads a version's file, and fetches it if it is missing; None if it does not exist.

        A fetched file that matches its digest is kept. The caller must check the
        digest of the returned bytes.

        Raises:
            UnusableRegistry: It cannot be read.
        """
        try:
            data = file_bytes(path)
        except FileNotFoundError:
            data = b""
            if self._may_be_brought(path.parent):
                found = self.from_shared(path)
                if found is not None and fits(entry, found):
                    self.keep_copy(path, found)
                    return found
                # The version was rewritten or removed meanwhile; the manifest shows which.
                self.renew(path.parent)
                return found
            return None
        if not fits(entry, data) and self.is_copy:
            # Damaged here, or rewritten in the object store.
            self.renew(path.parent)
            with usable("be read"):
                path.unlink(missing_ok=True)
            return self.file_here_or_brought(path, entry)
        return data

    def renew(self, folder: Path, mark: str = "") -> bool:
        """Fetches a copy's manifest again, and removes the version's other files if it changed. No-op outside a copy.

        Args:
            folder: Folder of a version.
            mark: Mark of the manifest in the object store; empty if unknown.

        Returns:
            Whether the manifest changed or the folder was removed.

        Raises:
            UnusableRegistry: It cannot be read.
        """
        path = folder / MANIFEST
        if not (self.is_copy and folder.parent.name in VERSIONED):
            return False
        try:
            own = file_bytes(path)
        except FileNotFoundError:
            return False
        if mark and mark_of(own) == mark:
            return False
        data = self.from_shared(path)
        if data is None:
            self._give_up_copy(folder)
            return True
        if data == own:
            return False
        with usable("be renewed"):
            for one in [one for one in folder.iterdir() if one.name != MANIFEST]:
                one.unlink(missing_ok=True)
        self.keep_copy(path, data)
        return True

    def give_up(self, folder: Path) -> None:
        """Removes the folder of a version with one rename; a missing folder is not an error.

        Raises:
            UnusableRegistry: The disk refused.
        """
        grave = self.temporary(f"removed-{folder.parent.name}-{folder.name}")
        with usable(f"give up {folder.name}"):
            try:
                folder.rename(grave)
            except FileNotFoundError:
                return
            shutil.rmtree(grave)

    def _may_be_brought(self, folder: Path) -> bool:
        return folder.parent.name in VERSIONED and folder.is_dir() and self.binding is not None

    def _give_up_copy(self, folder: Path) -> None:
        if folder.parent.name in VERSIONED and folder.is_dir() and self.is_copy:
            self.give_up(folder)
