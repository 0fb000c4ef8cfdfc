"""Chooses the location of a store whose pages change all the time: in memory if there is space, else on the disk.

    /dev/shm/springtide_<digest>/   mode 0700; the digest is derived from the link
    ├── link                        the path of the link to this store
    └── <name of the link>/         the store
    STATE/serving/rows              a link to the store in memory, or to
    STATE/serving/rows.disk/        if memory has no space for it
    STATE/serving/histories         a link to the store in memory while its writer runs, else the store itself
    STATE/stream-0/histories        likewise

Rows are a copy of the registry: if their link is missing or dangling, they are rebuilt from scratch. The writer of
histories saves them on the disk when it closes them (`state/disk/lmdb_store.py`).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from state import layout
from state.errors import reason_of

MEMORY = "/dev/shm"
"""The directory in memory that `storage.memory_dir` names by default."""
LEAST_BYTES = 256 << 20
GROWTH = 1.25
NAME = "springtide_"
LINK = "link"
FORGOTTEN_S = 60.0
IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Place:
    """The location of one store. `why` is why it is not in memory, unless the settings put it on the disk."""

    path: Path
    in_memory: bool
    why: str = ""


def choose(link: Path, memory: str, least_bytes: int | None = None) -> Place:
    """Chooses the location of a link's store. In memory, it also creates the directory that contains the store.

    The link's directory is locked. `memory` is `storage.memory_dir`, empty if nothing may be in memory. It must have space
    for `least_bytes`, and for a quarter more than the size of an existing store.
    """
    link.parent.mkdir(parents=True, exist_ok=True)
    if not memory:
        return on_disk(link, "")
    why = lack(link, memory, least_bytes)
    if not why:
        try:
            return Place(own(home(Path(memory), link)), True)
        except OSError as error:
            why = reason_of(error)
    return on_disk(link, why)


def lack(link: Path, memory: str, least_bytes: int | None = None) -> str:
    """Why a link's store cannot be in `memory`; empty if it can."""
    parent = Path(memory)
    try:
        if disk_kind(parent) not in IN_MEMORY:
            return f"{memory} is not in memory"
        present_bytes = size(home(parent, link))
        least_bytes = LEAST_BYTES if least_bytes is None else least_bytes
        wanted = max(least_bytes, int(GROWTH * max(present_bytes, size(link))))
        room = min(shutil.disk_usage(parent).free, psutil.virtual_memory().available) + present_bytes
    except OSError as error:
        return reason_of(error)
    return (
        "" if room >= wanted else f"{memory} has space for {room / 1e6:,.0f} MB, and {wanted / 1e6:,.0f} MB are wanted"
    )


def home(parent: Path, link: Path) -> Path:
    """The path of a link's store in `parent`, in a directory that no other link has.

    A link at the same path in another container gets another directory.
    """
    folder = link.parent.resolve()
    status = folder.stat()
    identity = f"{folder / link.name} {status.st_dev} {status.st_ino}"
    return parent.absolute() / f"{NAME}{hashlib.sha256(identity.encode()).hexdigest()[:16]}" / link.name


def own(store: Path) -> Path:
    """Creates the directory that contains a store, accessible only by its owner; returns `store`."""
    folder = store.parent
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise OSError(0, "is somebody else's", str(folder)) from None
        folder.chmod(0o700)
    return store


def on_disk(link: Path, why: str) -> Place:
    """The location next to the link; `why` is the reason why it is not in memory."""
    older = link.is_dir() and not link.is_symlink()  # the location that earlier releases used
    return Place(link if older else _beside(link), False, why)


def current(link: Path) -> Place | None:
    """The current location of a link's store; None if the link is dangling or missing."""
    if not link.is_dir():
        return None
    path = link.resolve()
    return Place(path, is_in_memory(path))


def settle(link: Path, location: Place) -> None:
    """Points the link to `location`, and removes every other store of this link. The caller holds the directory's lock.

    1. An existing store at `location` to which the link does not point is stale and is removed.
    2. The link is replaced atomically: a reader finds the old store or the new one.
    3. The other stores are removed; processes that have them open can still read them.
    """
    before = target_of(link)
    inside = location.path.is_relative_to(link.parent)
    if not inside:
        note(location.path, link)
    if location.path != link and before != location.path:
        # 1.
        if location.path.exists():
            shutil.rmtree(location.path)
        if link.is_dir() and not link.is_symlink():
            shutil.rmtree(link)
        # 2.
        temporary = link.with_name(f"{link.name}.link")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(location.path.relative_to(link.parent) if inside else location.path)
        temporary.replace(link)
    # 3.
    for store in {before, home(Path(MEMORY), link), _beside(link)}:
        if store is not None and store not in (location.path, link):
            remove(store, link)


def note(store: Path, link: Path) -> None:
    """Records next to a store in memory the link that points to it. If that link is gone, the store may be removed."""
    (store.parent / LINK).write_text(str(link.absolute()))


def target_of(link: Path) -> Path | None:
    """The target of a link, whether or not it exists; None if `link` is not a symbolic link."""
    return link.parent / link.readlink() if link.is_symlink() else None


def remove(store: Path, link: Path) -> None:
    """Removes a store of this link and, in memory, the directory that contains it; never a store of another link."""
    if store.is_relative_to(link.parent):
        shutil.rmtree(store, ignore_errors=True)
    elif store == home(store.parent.parent, link):
        shutil.rmtree(store.parent, ignore_errors=True)


def forget(link: Path) -> None:
    """Removes a link and its store, in any location; no process may be using it."""
    target = target_of(link)
    if target is None:
        shutil.rmtree(link, ignore_errors=True)
    else:
        link.unlink()
        remove(target, link)


def is_open(store: Path) -> bool:
    """Whether another process, even in another container, has a store open: LMDB then holds a lock on one byte."""
    try:
        with (store / "lock.mdb").open("r+b") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def remove_forgotten(memory: str, now_s: float | None = None) -> list[Path]:
    """Removes stores in `memory` whose link is gone or points elsewhere; returns their directories.

    Stores younger than a minute are kept.
    """
    now_s, removed = time.time() if now_s is None else now_s, list[Path]()
    for folder in sorted(Path(memory).glob(f"{NAME}*")) if memory else ():
        try:
            status = folder.lstat()
        except FileNotFoundError:  # Another process removed it after the directory was read.
            continue
        is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
        if is_own and now_s - status.st_mtime >= FORGOTTEN_S and _is_forgotten(folder):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                removed.append(folder)
    return removed


def size(store: Path) -> int:
    """The bytes that a store uses; 0 if there is none."""
    try:
        return (store / layout.DATA).stat().st_blocks * 512
    except OSError:
        return 0


def disk_kind(path: Path) -> str:
    """The file system type of `path`, such as ext4 or tmpfs; empty if it is unknown."""
    path = path.resolve(strict=True)
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    return next((mounts[folder] for folder in (path, *path.parents) if folder in mounts), "")


def is_in_memory(store: Path) -> bool:
    """Whether a store is in memory, in a directory that `own` created for it."""
    return store.resolve().parent.name.startswith(NAME)


def _beside(link: Path) -> Path:
    return link.with_name(f"{link.name}.disk")


def _is_forgotten(folder: Path) -> bool:
    try:
        link = Path((folder / LINK).read_text())
        if target_of(link) == folder / link.name:
            return False
    except OSError:
        pass
    return not any(is_open(store) for store in folder.glob("*/"))
