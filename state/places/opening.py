"""Opens a location for files by its name: a directory, an object store, or a URL that fsspec knows.

`DirectoryPlace` is a directory. Each write uses a temporary file, fsync, a rename or link, and an fsync of the
directory. `UrlPlace` is a file system of another machine, accessed through fsspec. What fsspec reports as written
is taken as durable.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from state.disk import files as durable
from state.errors import UnusablePlace
from state.places.place import FilePlace, reached, usable, without_password

_TEMPORARY = "~"
_numbers = itertools.count()

STORES = ("s3", "s3a", "gs", "az", "abfs", "abfss")
"""Protocols of object stores."""


class DirectoryPlace:
    """A directory, created at the first write. See `FilePlace`."""

    def __init__(self, path: Path) -> None:
        self.told = str(path)
        self._path = path

    def names(self, folder: str) -> list[str]:
        """See `FilePlace`."""
        root = self._path / folder
        with usable(self.told, "be listed"):
            found = [
                Path(at, name).relative_to(root).as_posix()
                for at, _, names in os.walk(root, onerror=_raised)
                for name in names
            ]
        return sorted(name for name in found if _TEMPORARY not in name)

    def read(self, name: str) -> bytes:
        """See `FilePlace`."""
        with usable(self.told, f"give {name}"):
            return (self._path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """See `FilePlace`."""
        with usable(self.told, f"take {name}"), self._written(name, data) as (temporary, final):
            temporary.replace(final)

    def create(self, name: str, data: bytes) -> bool:
        """See `FilePlace`."""
        with usable(self.told, f"take {name}"), self._written(name, data) as (temporary, final):
            try:
                os.link(temporary, final)
            except FileExistsError:
                return False
        return True

    def remove(self, name: str) -> None:
        """See `FilePlace`."""
        with usable(self.told, f"give up {name}"):
            (self._path / name).unlink(missing_ok=True)

    @contextmanager
    def _written(self, name: str, data: bytes) -> Iterator[tuple[Path, Path]]:
        """Yields a synced temporary file and the final path; then removes the former and syncs the directory."""
        final = self._path / name
        own = f"{os.getpid()}-{threading.get_ident()}-{next(_numbers)}"
        temporary = final.with_name(f"{final.name}{_TEMPORARY}{own}")
        if not final.parent.is_dir():
            final.parent.mkdir(parents=True, exist_ok=True)
            durable.sync_directory(final.parent.parent)
        try:
            durable.write(temporary, data)
            yield temporary, final
        finally:
            temporary.unlink(missing_ok=True)
        durable.sync_directory(final.parent)


def _raised(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


class UrlPlace:
    """A location that fsspec reaches, such as `sftp://host/folder`. See `FilePlace`.

    Raises:
        UnusablePlace: The library for its protocol is not installed, or it cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self.told = without_password(url)
        try:
            import fsspec

            with reached(self.told, "be opened"):
                self._files, self._root = fsspec.url_to_fs(url)
        except ImportError as error:
            raise UnusablePlace(
                f"{self.told} cannot be opened ({error})",
                "install what fsspec names there, such as paramiko for sftp://",
            ) from error
        self._made: set[str] = set()

    def names(self, folder: str) -> list[str]:
        """See `FilePlace`."""
        root = f"{self._root}/{folder}".rstrip("/")
        with reached(self.told, "be listed"):
            self._files.invalidate_cache()
            try:
                found: list[str] = self._files.find(root)
            except FileNotFoundError:
                found = []
        # The root is a path from the root of the file system.
        return sorted(name.removeprefix(root).removeprefix("/") for name in found if name.strip("/") != root.strip("/"))

    def read(self, name: str) -> bytes:
        """See `FilePlace`."""
        with reached(self.told, f"give {name}"):
            data: bytes = self._files.cat_file(f"{self._root}/{name}")
            return data

    def write(self, name: str, data: bytes) -> None:
        """See `FilePlace`."""
        with reached(self.told, f"take {name}"):
            self._files.pipe_file(self._path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """See `FilePlace`."""
        try:
            with reached(self.told, f"take {name}"):
                self._files.pipe_file(self._path(name), data, mode="create")
        except FileExistsError:
            return False
        return True

    def remove(self, name: str) -> None:
        """See `FilePlace`."""
        with reached(self.told, f"give up {name}"), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(f"{self._root}/{name}")

    def _path(self, name: str) -> str:
        path = f"{self._root}/{name}"
        folder = path.rpartition("/")[0]
        if folder not in self._made:
            self._files.makedirs(folder, exist_ok=True)
            self._made.add(folder)
        return path


def open_place(text: str) -> FilePlace:
    """The location that an argument or a setting names: a directory, an object store, or a URL that fsspec knows.

    >>> open_place("/mnt/backups").told, open_place("file:///mnt/backups").told
    ('/mnt/backups', '/mnt/backups')

    Raises:
        UnusablePlace: It cannot be reached, or the library for its protocol is not installed.
    """
    if "://" not in text or text.startswith("file://"):
        return DirectoryPlace(Path(text.removeprefix("file://")))
    if text.partition("://")[0] in STORES:
        # Only deployments with an object store need its client and that of AWS.
        from state.places.store import StorePlace

        return StorePlace(text)
    return UrlPlace(text)
