"""The registry's directory, and the object store with which a shared registry synchronises it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from state import layout
from state.disk import documents
from state.disk import files as durable
from state.errors import SettingsError, UnusablePlace, UnusableRegistry, reason_of
from state.file_store import FileStore, open_store

if TYPE_CHECKING:
    from state.registry.claim import Claim

BINDING = "shared.json"
Document = TypeVar("Document")


class Binding(msgspec.Struct, frozen=True):
    """The object store in which a registry's directory is shared, as stored in the directory.

    Attributes:
        url: URL of the object store.
        claim: The claim number under which this host's trainer owns the versions; 0 for a copy.
    """

    url: str
    claim: int = 0

    @property
    def is_copy(self) -> bool:
        """Whether another host's trainer creates the versions, or no trainer does yet."""
        return self.claim == 0


def bound(path: Path) -> Binding | None:
    """Reads the binding of a directory; None if it is not shared.

    Raises:
        SettingsError: The binding is damaged.
    """
    try:
        return documents.decode((path / BINDING).read_bytes(), Binding)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except msgspec.MsgspecError as error:
        raise SettingsError(
            f"{path / BINDING} is damaged: {error}",
            "remove it; the next start with paths.shared_registry writes it again",
        ) from error


class Directory:
    """A registry's directory, with a folder for temporary files, whose names carry their writer.

    Args:
        claim: The trainer's claim, whose staging folder has the temporary files; None in other processes.
    """

    def __init__(self, path: Path, claim: Claim | None = None) -> None:
        self.path, self.claim = path, claim
        self._store: FileStore | None = None

    def ensure(self, *folders: str) -> None:
        """Creates folders. Failures are ignored: a reader may not need them, and the first use reports the error."""
        with suppress(OSError):
            for name in (*folders, layout.TEMPORARY):
                (self.path / name).mkdir(parents=True, exist_ok=True)

    def sweep(self) -> list[str]:
        """Deletes the files of dead writers under `tmp/`; returns the names."""
        with usable("be swept"):
            leftovers = [
                path
                for path in (self.path / layout.TEMPORARY).iterdir()
                if durable.is_dead(path.name.rpartition("~")[2])
            ]
            for path in leftovers:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return [path.name for path in leftovers]

    @property
    def staging(self) -> Path | None:
        """The staging folder of the trainer's claim; None without a claim."""
        return None if self.claim is None else self.claim.staging

    def temporary(self, name: str) -> Path:
        """A path for a temporary file or folder of this process, which does not exist yet."""
        folder = self.staging or self.path / layout.TEMPORARY
        return folder / f"{name}-{os.urandom(4).hex()}~{durable.owner_mark()}"

    @contextmanager
    def staged(self, name: str) -> Iterator[Path]:
        """A new folder under `tmp/`, for content that one rename makes visible; the rest of it is removed."""
        folder = self.temporary(name)
        try:
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def create(self, path: Path, data: bytes) -> bool:
        """Creates a file durably; False if it exists."""
        return durable.create(path, data, self.temporary(path.name))

    def replace(self, path: Path, data: bytes) -> None:
        """Creates or replaces a file durably."""
        durable.replace(path, data, self.temporary(path.name))

    @property
    def binding(self) -> Binding | None:
        """The binding of this directory to an object store; None if the registry is not shared."""
        return bound(self.path)

    @property
    def is_copy(self) -> bool:
        """Whether this directory is a copy whose files can be fetched again."""
        binding = self.binding
        return binding is not None and binding.is_copy

    @property
    def shared(self) -> FileStore | None:
        """The object store in which the registry is shared; None if it is not shared.

        Raises:
            UnusableRegistry: It cannot be opened.
        """
        if self._store is None and (binding := self.binding) is not None:
            with sharing():
                self._store = open_store(binding.url)
        return self._store

    @shared.setter
    def shared(self, store: FileStore) -> None:
        """Replaces the client of the same object store, for example by one that counts requests."""
        self._store = store

    def fetch(self, path: Path) -> bytes | None:
        """Reads a file of this directory from the object store; None if it is missing there or nothing is shared.

        Raises:
            UnusableRegistry: The object store cannot be reached.
        """
        store = self.shared
        if store is None:
            return None
        with sharing(), suppress(FileNotFoundError):
            return store.read(path.relative_to(self.path).as_posix())
        return None

    def content(self, path: Path, sha256: str) -> bytes:
        """Reads an immutable file that is named by its digest; fetches and keeps it if it is missing on this host.

        A copy also fetches a file whose local bytes are damaged.

        Raises:
            FileNotFoundError: It exists neither locally nor in the object store, or its folder was removed.
            ValueError: It fails its digest.
            UnusableRegistry: It cannot be read, or the object store cannot be reached.
        """
        try:
            data = file_bytes(path)
            if durable.digest(data) == sha256:
                return data
            if not self.is_copy:
                raise ValueError(f"{path} fails its digest")
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise
        fetched = self.fetch(path)
        if fetched is None:
            raise FileNotFoundError(path)
        if durable.digest(fetched) != sha256:
            raise ValueError(f"{path} fails its digest")
        self.keep(path, fetched)
        return fetched

    def keep(self, path: Path, data: bytes) -> None:
        """Replaces a file by fetched bytes, durably. Does nothing if the file's folder was removed meanwhile.

        Raises:
            UnusableRegistry: The disk refused.
        """
        with usable(f"keep {path.name}"):
            try:
                self.replace(path, data)
            except FileNotFoundError:
                if path.parent.is_dir():
                    raise

    def remove_folder(self, folder: Path) -> None:
        """Removes a folder with one rename; a missing folder is not an error.

        Raises:
            UnusableRegistry: The disk refused.
        """
        grave = self.temporary(f"removed-{folder.parent.name}-{folder.name}")
        with usable(f"remove {folder.name}"):
            try:
                folder.rename(grave)
            except FileNotFoundError:
                return
            shutil.rmtree(grave)


def own_documents(folder: Path, kind: type[Document]) -> dict[str, Document]:
    """The documents that processes of this host replace in a folder, by file name; unreadable ones are skipped."""
    by_name = {}
    for path in sorted(folder.glob("*.json")):
        with suppress(OSError, ValueError):
            by_name[path.name] = documents.decode(path.read_bytes(), kind)
    return by_name


def stored_documents(store: FileStore, folder: str, kind: type[Document], own: Collection[str]) -> dict[str, Document]:
    """The documents of other hosts in an object store, by name, without those named in `own`; likewise."""
    by_name = {}
    for name in store.names(folder):
        if name not in own:
            with suppress(FileNotFoundError, ValueError):
                by_name[name] = documents.decode(store.read(f"{folder}/{name}"), kind)
    return by_name


def all_documents(directory: Directory, folder: str, kind: type[Document]) -> list[Document]:
    """The documents of the processes of all hosts; those of this host are read locally.

    Raises:
        UnusableRegistry: The object store of the shared registry cannot be reached.
    """
    by_name = own_documents(directory.path / folder, kind)
    if (store := directory.shared) is not None:
        with sharing():
            by_name |= stored_documents(store, folder, kind, by_name)
    return list(by_name.values())


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
    """Converts an error of the operating system to an error of the registry. The file is not treated as damaged.

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
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnusableRegistry(
            f"{path} cannot be read ({reason_of(error)})", "correct its access rights, and start again"
        ) from error
