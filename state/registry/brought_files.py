"""The files of durable versions, where a shared registry's directory may have their names alone: what is read is brought, and stays.

A copy knows a version by its folder, which may be empty. What is missing there
is read from the place where the registry is shared, compared with its digest
and kept. A folder that the place has no more goes here too.
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
    """Whether these are a file's bytes.

    >>> fits(FileEntry(hashlib.sha256(b"12").hexdigest(), 2), b"12"), fits(FileEntry("", 2), b"13")
    (True, False)
    """
    return len(data) == entry.bytes and hashlib.sha256(data).hexdigest() == entry.sha256


class BroughtFiles(Folders):
    """The files of one registry's versions, here or in the place where it is shared."""

    @property
    def is_copy(self) -> bool:
        """Whether what is here was brought from elsewhere, and can be again."""
        found = self.binding
        return found is not None and found.is_copy

    def manifest_bytes(self, folder: Path) -> bytes:
        """The manifest in a version's folder.

        Raises:
            FileNotFoundError: There is none, here or where the registry is shared.
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
        """The bytes of a version's file; None where there is none. What was brought and fits is kept; compare what is returned.

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
                # Rewritten or removed meanwhile, where there is nothing: the manifest says which.
                self.renew(path.parent)
                return found
            return None
        if not fits(entry, data) and self.is_copy:
            # Damaged here, or rewritten there.
            self.renew(path.parent)
            with usable("be read"):
                path.unlink(missing_ok=True)
            return self.file_here_or_brought(path, entry)
        return data

    def renew(self, folder: Path, mark: str = "") -> bool:
        """Brings a copy's manifest again; where it is another one, all files of before go. Nothing happens elsewhere.

        Args:
            folder: Of a version.
            mark: Of the manifest there; empty where it is not known.

        Returns:
            Whether it was another one, or the folder went.

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
        """Takes the folder of a version away by one rename; one that is gone is no error.

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
