"""A directory as a place for files: temporary file, fsync, rename or link, fsync of the directory."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from state.disk import files as durable
from state.places.place import usable

_TEMPORARY = "~"
_numbers = itertools.count()


class DirectoryPlace:
    """A directory, made at the first write. See `FilePlace`."""

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
        """A synced temporary file beside the final one; what the block made of it is durable, the rest is gone."""
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
