"""The registry's directory, and the object store with which a shared registry synchronises it.

A trainer claims the directory: with a lock with a lease, and a staging folder that fences the former holder.

A trainer publishes only files that it wrote to its own staging folder, `tmp/claim-*`. A rename or a hard link from that
folder makes each file visible. A process that takes the claim first moves the staging folders of all others away. From
then on the file system refuses every publication of a former holder, even between its last check and the rename.

1. The lock is free once its holder has ended, for whatever reason. The kernel releases it at once.
2. A frozen holder keeps the lock, but does not renew it. After `LEASE_S` without a renewal, another trainer takes the
   lock over. The clocks of two hosts are never compared.
3. Commands such as `springtide upgrade` hold the lock without a lease, so it cannot be taken over.

The file system must be one on which a rename is atomic for all hosts, such as a local disk, NFS or CephFS.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from state import layout
from state.disk import documents
from state.disk import files as durable
from state.disk.lock import DirectoryLock, Seen, holder_of, is_held
from state.errors import LockHeld, RegistryError, SettingsError, UnusablePlace, UnusableRegistry, reason_of
from state.file_store import FileStore, open_store
from state.process import killpoints

LEASE_S = 10.0
"""Time without a renewal after which a standby takes over."""
RENEW_S, POLL_S = 2.0, 0.25
STANDBY_S = 10.0
"""A standby whose file is older than this no longer counts."""
_CLAIM, _STANDBY = "claim-", "standby-"
_LEASE = "lease"
logger = logging.getLogger(__name__)


class Silence:
    """Measures how long a value that another process renews has not changed.

    A late poll counts as `MOST_S` at most, because this process may have been frozen together with the other one.
    """

    MOST_S = 4.0

    def __init__(self, elapsed: Callable[[], float] = time.monotonic) -> None:
        self._elapsed = elapsed
        self._seen: object = None
        self._polled_s = self._silent_s = 0.0

    def poll(self, seen: object) -> float:
        """How long `seen` has been unchanged, in seconds."""
        now_s = self._elapsed()
        self._silent_s += min(now_s - self._polled_s, self.MOST_S)
        if seen != self._seen:
            self._seen, self._silent_s = seen, 0.0
        self._polled_s = now_s
        return self._silent_s


class Claim:
    """The claim of one trainer on a registry's directory. Any thread may check and confirm.

    Attributes:
        staging: The folder from which this trainer publishes; it exists while the claim is held.
        held: Whether `take` succeeded; `check` detects whether the claim was lost since.
        took_over: Whether the claim was taken from a process that may still run.
        ask_store: Checks the claim in the object store of a shared registry (LockHeld, UnusableRegistry); None if the
            registry is not shared.
    """

    def __init__(self, path: Path, elapsed: Callable[[], float] = time.monotonic) -> None:
        self._path, self._silence = path, Silence(elapsed)
        self.staging = path / layout.TEMPORARY / f"{_CLAIM}{os.urandom(4).hex()}~{durable.owner_mark()}"
        self._lock = DirectoryLock(path, layout.TRAINER_LOCK, {_LEASE: self.staging.name})
        self._stop, self._renewing = threading.Event(), threading.Thread(target=self._renew, name="claim", daemon=True)
        self.held = self.took_over = False
        self.ask_store: Callable[[], None] | None = None
        self._elapsed, self._ticked_s, self._slept = elapsed, elapsed(), False

    def take(self) -> None:
        """Takes the claim if it is free or its lease has expired.

        1. Other processes are temporarily excluded from claiming.
        2. The staging folders of all former holders are moved away, so that these can no longer publish.
        3. The lock is taken over if its holder is silent.

        Raises:
            LockHeld: Another process holds the claim.
            UnusableRegistry: The disk refused.
        """
        # 1.
        with DirectoryLock(self._path, layout.TAKEOVER_LOCK):
            try:
                self._lock.acquire()
            except LockHeld:
                if not self._has_expired(self._lock.seen()):
                    raise
                self.took_over = True
            with usable("be claimed", str(self._path)):
                # 2.
                self._fence()
                killpoints.reach("claim.fenced")
                # 3.
                if self.took_over:
                    self._lock.take_over()
                self.staging.mkdir(parents=True)
        self._ticked_s = self._elapsed()
        self.held = True
        self._renewing.start()

    def check(self) -> None:
        """Checks that the claim is still held; takes some microseconds.

        Raises:
            LockHeld: Another trainer took it over.
        """
        if self.held and self._lock.is_lost:
            raise LockHeld(
                f"this trainer lost its claim on {self._path} to {holder_of(self._lock.seen().content)}, because it did not "
                f"renew it for {LEASE_S:g} s; it has published nothing since",
                "start it again: it becomes the standby",
            )

    def confirm(self) -> None:
        """Checks the claim before a publication. If this process was frozen, it also checks with the object store.

        Raises:
            LockHeld: Another trainer took it over.
            UnusableRegistry: The object store is needed and cannot be reached.
        """
        self.check()
        self._tick()
        if self._slept:
            if self.ask_store is not None:
                self.ask_store()
            self._slept = False

    def release(self) -> None:
        """Releases the claim, so that another trainer can take it at once."""
        self._stop.set()
        if self.held:
            self._renewing.join()
        shutil.rmtree(self.staging, ignore_errors=True)
        self._lock.release()

    def _has_expired(self, seen: Seen) -> bool:
        try:
            leased = _LEASE in json.loads(seen.content)
        except ValueError:
            leased = False
        return self._silence.poll(seen) >= LEASE_S and leased

    def _fence(self) -> None:
        folder = self._path / layout.TEMPORARY
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"{_CLAIM}*"):
            grave = folder / f"fenced-{os.urandom(4).hex()}~{durable.owner_mark()}"
            # The lock's holder may be releasing it.
            with suppress(FileNotFoundError):
                path.rename(grave)
            shutil.rmtree(grave, ignore_errors=True)

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            self._tick()
            self._lock.renew()

    def _tick(self) -> None:
        now_s = self._elapsed()
        self._slept = self._slept or now_s - self._ticked_s > LEASE_S / 2
        self._ticked_s = now_s


@contextmanager
def claiming(path: Path, stopping: threading.Event, on_wait: Callable[[str], None]) -> Iterator[Claim]:
    """Holds the claim on a registry's directory while the block runs; waits as a standby until it is free or expired.

    Args:
        path: The registry's directory.
        stopping: Ends the wait: SystemExit.
        on_wait: Called once with the holder, in words, if this process has to wait.

    Raises:
        LockHeld: The claim was lost while the block ran.
        SystemExit: `stopping` was set while it waited.
    """
    claim, present = Claim(path), None
    try:
        while not claim.held:
            try:
                claim.take()
            except LockHeld as error:
                if present is None:
                    on_wait(str(error.what))
                    present = StandbyFile(path)
                present.renew()
                if stopping.wait(POLL_S):
                    raise SystemExit(0) from None
        if present is not None:
            present.remove()
        try:
            yield claim
        except (RegistryError, OSError):
            # The file system may have refused a publication because the claim was lost.
            claim.check()
            raise
    finally:
        if present is not None:
            present.remove()
        claim.release()


class StandbyFile:
    """A file under `tmp/` with which a standby announces itself; `springtide status` lists these files."""

    def __init__(self, path: Path) -> None:
        self._file = path / layout.TEMPORARY / f"{_STANDBY}{os.urandom(4).hex()}~{durable.owner_mark()}"

    def renew(self) -> None:
        """Renews the file, to show that the standby is running."""
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.touch()

    def remove(self) -> None:
        """Removes the file."""
        self._file.unlink(missing_ok=True)


def trainer_of(path: Path) -> str:
    """Describes the process that holds the claim of a registry's directory; empty if there is none.

    In a copy of a shared registry, it is the standby of this host.
    """
    if not is_held(path, layout.TRAINER_LOCK):
        return ""
    return holder_of((path / layout.TRAINER_LOCK).read_bytes())


def standbys(path: Path, now_s: float) -> list[str]:
    """The standbys of a registry's directory, each as `process PID on HOST`, ascending."""
    names = []
    for file in (path / layout.TEMPORARY).glob(f"{_STANDBY}*"):
        with suppress(FileNotFoundError):
            if now_s - file.stat().st_mtime < STANDBY_S:
                host, pid, _ = file.name.rpartition("~")[2].rsplit("@", 2)
                names.append(f"process {pid} on {host}")
    return sorted(names)


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

    def add_folder(
        self, folder: Path, document_name: str, document: Mapping[str, Any], fill: Callable[[Path], None]
    ) -> bool:
        """Adds a folder durably; False if another process was faster, whose folder is kept.

        1. `fill` writes its files to a temporary folder.
        2. The sealed document, of any JSON values, is written next to them, with their digests as `files`.
        3. The folder gets its name.
        """
        with self.staged(f"{folder.parent.name}-{folder.name}") as temporary:
            # 1.
            fill(temporary)
            files = {
                str(path.relative_to(temporary)): durable.digest(path.read_bytes())
                for path in sorted(temporary.rglob("*"))
                if path.is_file()
            }
            # 2.
            durable.write(temporary / document_name, documents.encode_sealed({**document, "files": files}))
            durable.sync_tree(temporary)
            killpoints.reach("folder.written")
            # 3.
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.rename(folder)
            except OSError:
                if not (folder / document_name).exists():
                    raise
                return False
            durable.sync_directory(folder.parent)
        return True

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
def usable(doing: str, name: str = "the registry") -> Iterator[None]:
    """Converts an error of the operating system to an error of the registry. The file is not treated as damaged.

    Raises:
        UnusableRegistry: The disk is full or read-only, or permissions are missing.
    """
    try:
        yield
    except OSError as error:
        raise UnusableRegistry(
            f"{name} cannot {doing} ({reason_of(error)})",
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
