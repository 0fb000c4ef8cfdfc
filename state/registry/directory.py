"""The registry's directory: what each part of it is written and read with."""

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
    """A directory with a folder for what is being written, whose names carry their writer.

    Args:
        path: The registry's directory.
        folders: The names of the folders that this part of the registry uses.
    """

    def __init__(self, path: Path, *folders: str) -> None:
        self.path = path
        self._place: FilePlace | None = None
        # Whoever only reads may do without, and an applier waits for its registry: the first use says what is wrong.
        with suppress(OSError):
            for name in (*folders, layout.TEMPORARY):
                (path / name).mkdir(parents=True, exist_ok=True)

    def sweep(self) -> list[str]:
        """Deletes what dead writers left under `tmp/`; returns the names."""
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
        """A path for what is written next, by this process alone."""
        path = self.path / layout.TEMPORARY / f"{what}~{durable.owner_mark()}"
        shutil.rmtree(path, ignore_errors=True)
        return path

    # Where it is shared

    @property
    def binding(self) -> Binding | None:
        """Where the registry is shared, and whether this directory is a copy; None where it is shared with nobody."""
        return bound(self.path)

    @property
    def shared(self) -> FilePlace | None:
        """The place in which the registry is shared; None where it is shared with nobody.

        Raises:
            UnusableRegistry: It cannot be opened.
        """
        if self._place is None and (found := self.binding) is not None:
            with sharing():
                self._place = open_place(found.url)
        return self._place

    @shared.setter
    def shared(self, place: FilePlace) -> None:
        """Another way to the same place, such as one that counts requests."""
        self._place = place

    def from_shared(self, path: Path) -> bytes | None:
        """The bytes that a file of this directory has in the place where it is shared; None where it has none there.

        Raises:
            UnusableRegistry: The place cannot be reached.
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
        """The bytes of a file that is known by its digest, brought from where the registry is shared if it is not here.

        Raises:
            FileNotFoundError: Nobody has it.
            ValueError: It fails its digest.
            UnusableRegistry: It cannot be read, or the place cannot be reached.
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
        """Writes what was brought from there to its file in this directory, durably; one that is there is replaced.

        Nothing is written where its folder went meanwhile.

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
    """Turns what the place of a shared registry refuses into an error of the registry.

    Raises:
        UnusableRegistry: It cannot be reached, or refuses.
    """
    try:
        yield
    except UnusablePlace as error:
        raise UnusableRegistry(error.what, error.do) from error


@contextmanager
def usable(doing: str) -> Iterator[None]:
    """Turns what the operating system refuses into an error of ours.

    A file that cannot be read is not a damaged one: nothing is set aside, and
    nothing older is taken in its place.

    Raises:
        UnusableRegistry: The disk is full or read-only, or rights are missing.
    """
    try:
        yield
    except OSError as error:
        raise UnusableRegistry(
            f"the registry cannot {doing} ({reason_of(error)})",
            "free space or correct its access rights, and start again",
        ) from error


def file_bytes(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        FileNotFoundError: There is none.
        UnusableRegistry: It is there and cannot be read.
    """
    with usable("be read"):
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            missing = error
    raise missing
