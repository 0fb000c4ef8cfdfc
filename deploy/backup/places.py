"""Where backups lie: a directory, or an object store that fsspec reaches; files in it are whole or absent.

objects/<first two digits>/<sha256>   pieces of files, zstd     deploy/backup/objects.py
backups/<id>.json                     what makes one up         deploy/backup/documents.py
locks/<owner>.json                    who writes here now       deploy/backup/lease.py
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from state.disk import files as durable
from state.errors import BackupError, reason_of

OBJECTS, BACKUPS, LOCKS = "objects", "backups", "locks"
_TEMPORARY = "~"


class BackupPlace(Protocol):
    """A place for backups. Names are paths relative to it, with `/` between their parts.

    Attributes:
        told: How it is called in messages, without a password.
    """

    told: str

    def names(self, folder: str) -> list[str]:
        """The last parts of the names of all files below `folder`, ascending; none where there is no such folder."""
        ...

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            FileNotFoundError: There is none.
            BackupError: It cannot be read.
        """
        ...

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, or replaces it; whole, and durable when this returns."""
        ...

    def remove(self, name: str) -> None:
        """Takes a file away; one that is gone already is no error."""
        ...


class DirectoryPlace:
    """A directory, made at the first write."""

    def __init__(self, path: Path) -> None:
        self.told = str(path)
        self._path = path

    def names(self, folder: str) -> list[str]:
        """See `BackupPlace`."""
        with usable(self.told, "be listed"):
            found = [name for _, _, names in os.walk(self._path / folder, onerror=_raised) for name in names]
        return sorted(name for name in found if _TEMPORARY not in name)

    def read(self, name: str) -> bytes:
        """See `BackupPlace`."""
        with usable(self.told, f"give {name}"):
            return (self._path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """See `BackupPlace`."""
        final = self._path / name
        temporary = final.with_name(f"{final.name}{_TEMPORARY}{os.getpid()}")
        with usable(self.told, f"take {name}"):
            self._make(final.parent)
            temporary.unlink(missing_ok=True)
            try:
                durable.write(temporary, data)
                temporary.replace(final)
            finally:
                temporary.unlink(missing_ok=True)
            durable.sync_directory(final.parent)

    def remove(self, name: str) -> None:
        """See `BackupPlace`."""
        with usable(self.told, f"give up {name}"):
            (self._path / name).unlink(missing_ok=True)

    def _make(self, folder: Path) -> None:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            durable.sync_directory(folder.parent)


class UrlPlace:
    """A place that fsspec reaches, such as `s3://bucket/folder`: an object store, whose objects are whole or absent.

    Raises:
        BackupError: What its protocol needs is not installed, or it cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self.told = without_password(url)
        try:
            import fsspec

            with reached(self.told, "be opened"):
                self._files, self._root = fsspec.url_to_fs(url)
        except ImportError as error:
            raise BackupError(
                f"{self.told} cannot be opened ({error})", "install what fsspec names there, such as s3fs for s3://"
            ) from error
        self._made: set[str] = set()

    def names(self, folder: str) -> list[str]:
        """See `BackupPlace`."""
        with reached(self.told, "be listed"):
            self._files.invalidate_cache()
            try:
                found: list[str] = self._files.find(f"{self._root}/{folder}")
            except FileNotFoundError:
                found = []
        return sorted(name.rpartition("/")[2] for name in found)

    def read(self, name: str) -> bytes:
        """See `BackupPlace`."""
        with reached(self.told, f"give {name}"):
            data: bytes = self._files.cat_file(f"{self._root}/{name}")
            return data

    def write(self, name: str, data: bytes) -> None:
        """See `BackupPlace`."""
        path = f"{self._root}/{name}"
        folder = path.rpartition("/")[0]
        with reached(self.told, f"take {name}"):
            if folder not in self._made:
                self._files.makedirs(folder, exist_ok=True)
                self._made.add(folder)
            self._files.pipe_file(path, data)

    def remove(self, name: str) -> None:
        """See `BackupPlace`."""
        with reached(self.told, f"give up {name}"), suppress(FileNotFoundError):
            self._files.rm_file(f"{self._root}/{name}")


def open_place(text: str) -> BackupPlace:
    """The place that a word of the command line names.

    >>> open_place("/mnt/backups").told, open_place("file:///mnt/backups").told
    ('/mnt/backups', '/mnt/backups')

    Raises:
        BackupError: It cannot be reached, or nothing that reaches it is installed.
    """
    if "://" not in text or text.startswith("file://"):
        return DirectoryPlace(Path(text.removeprefix("file://")))
    return UrlPlace(text)


def without_password(url: str) -> str:
    """A URL as it may be shown.

    >>> without_password("sftp://ann:secret@host/folder"), without_password("s3://bucket/folder")
    ('sftp://host/folder', 's3://bucket/folder')
    """
    return re.sub(r"://[^/@]*@", "://", url)


@contextmanager
def usable(told: str, doing: str) -> Iterator[None]:
    """Turns what the operating system refuses into an error of ours; a file that is not there stays one.

    Raises:
        FileNotFoundError: A file is not there.
        BackupError: The disk is full or read-only, or rights are missing.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BackupError(
            f"{told} cannot {doing} ({reason_of(error)})", "free space or correct its access rights, and repeat it"
        ) from error


@contextmanager
def reached(told: str, doing: str) -> Iterator[None]:
    """As `usable`, for what is behind a network: each file system of fsspec has errors of its own.

    Raises:
        FileNotFoundError: A file is not there.
        ImportError: Something is not installed.
        BackupError: It cannot be reached, or refused.
    """
    try:
        yield
    except (FileNotFoundError, ImportError):
        raise
    except Exception as error:
        detail: Any = without_password(str(error)) or type(error).__name__
        raise BackupError(
            f"{told} cannot {doing} ({detail})", "check the network and your rights there, and repeat it"
        ) from error


def _raised(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
