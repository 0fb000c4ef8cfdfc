"""A file system of another machine as a place for files, as fsspec reaches it: what it says is written is taken for durable."""

from __future__ import annotations

import contextlib

from state.errors import UnusablePlace
from state.places.place import reached, without_password


class UrlPlace:
    """A place that fsspec reaches, such as `sftp://host/folder`. See `FilePlace`.

    Raises:
        UnusablePlace: What its protocol needs is not installed, or it cannot be reached.
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
