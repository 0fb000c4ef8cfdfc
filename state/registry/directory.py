"""The registry's directory: reading and writing its files, here and in the object store of a shared registry."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from state import layout
from state.disk import files as durable
from state.errors import UnusablePlace, UnusableRegistry, reason_of
from state.places.opening import open_place
from state.places.place import FilePlace
from state.registry.sharing.binding import Binding, bound


class Directory:
    """A directory with a folder for temporary files, whose names carry their writer.

    Args:
        path: The registry's directory.
        folders: Names of the folders that this part of the registry uses.
    """

    def __init__(self, path: Path, *folders: str) -> None:
        self.path = path
        self._place: FilePlace | None = None
        # A reader may do without the folders, and an applier waits for its registry. The first use reports the error.
        with suppress(OSError):
            for name in (*folders, layout.TEMPORARY):
                (path / name).mkdir(parents=True, exist_ok=True)

    def sweep(self) -> list[str]:
        """Deletes the files of dead writers under `tmp/`; returns the names."""
        with usable("be swept"):
            left = [
                path
                for path in (self.path / layout.TEMPORARY).iterdir()
                if durable.is_dead(path.name.rpartition("~")[2])
            ]
            for path in left:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return [path.name for path in left]

    def temporary(self, what: str) -> Path:
        """A path for a temporary file or folder of this process."""
        path = self.path / layout.TEMPORARY / f"{what}~{durable.owner_mark()}"
        shutil.rmtree(path, ignore_errors=True)
        return path

    # Shared registry

    @property
    def binding(self) -> Binding | None:
        """Where the registry is shared, and whether this directory is a copy; None if it is not shared."""
        return bound(self.path)

    @property
    def shared(self) -> FilePlace | None:
        """The object store in which the registry is shared; None if it is not shared.

        Raises:
            UnusableRegistry: It cannot be opened.
        """
        if self._place is None and (found := self.binding) is not None:
            with sharing():
                self._place = open_place(found.url)
        return self._place

    @shared.setter
    def shared(self, place: FilePlace) -> None:
        """Replaces the client of the same object store, for example by one that counts requests."""
        self._place = place

    def from_shared(self, path: Path) -> bytes | None:
        """Reads a file of this directory from the object store; None if it is missing there or nothing is shared.

        Raises:
            UnusableRegistry: The object store cannot be reached.
        """
        place = self.shared
        if place is None:
            return None
        try:
            with sharing():
                return place.read(path.relative_to(self.path).as_posix())
        except FileNotFoundError:
            return None

    def content(self, path: Path, sha256: str) -> bytes:
        """Reads a file that is known by its digest; fetches it from the object store if it is missing here.

        Raises:
            FileNotFoundError: It exists neither here nor in the object store.
            ValueError: It fails its digest.
            UnusableRegistry: It cannot be read, or the object store cannot be reached.
        """
        try:
            data, brought = file_bytes(path), False
        except FileNotFoundError:
            found = self.from_shared(path)
            if found is None:
                raise
            data, brought = found, True
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError(f"{path} fails its digest")
        if brought:
            self.keep_copy(path, data)
        return data

    def keep_copy(self, path: Path, data: bytes) -> None:
        """Writes fetched bytes to their file in this directory, durably; an existing file is replaced.

        Nothing is written if the file's folder was removed meanwhile.

        Raises:
            UnusableRegistry: The disk refused.
        """
        temporary = self.temporary(f"brought-{path.name}-{os.urandom(4).hex()}")
        with usable(f"keep {path.name}"):
            try:
                durable.write(temporary, data)
                if path.parent.is_dir():
                    temporary.replace(path)
                    durable.sync_directory(path.parent)
            finally:
                temporary.unlink(missing_ok=True)


@contextmanager
def sharing() -> Iterator[None]:
    """Converts an error of a shared registry's object store to an error of the registry.

    Raises:
        UnusableRegistry: The object store cannot be reached, or refuses.
    """
    try:
        yield
    except UnusablePlace as error:
        raise UnusableRegistry(error.what, error.do) from error


@contextmanager
def usable(doing: str) -> Iterator[None]:
    """Converts an error of the operating system to an error of the registry.

    A file that cannot be read is not treated as damaged: nothing is set aside, and
    nothing older replaces it.

    Raises:
        UnusableRegistry: The disk is full or read-only, or permissions are missing.
    """
    try:
        yield
    except OSError as error:
        raise UnusableRegistry(
            f"the registry cannot {doing} ({reason_of(error)})",
            "free space or correct its access rights, and start again",
        ) from error


def file_bytes(path: Path) -> bytes:
    """Reads a file.

    Raises:
        FileNotFoundError: It does not exist.
        UnusableRegistry: It exists and cannot be read.
    """
    with usable("be read"):
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            missing = error
    raise missing
