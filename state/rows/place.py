"""Where serving's rows lie: in memory where there is room, else on the disk; `STATE/serving/rows` is a link that leads there.

    /dev/shm/springtide-<digest>/   0700, its name made of the serving directory's
    ├── link                        the path of the link that leads here
    └── rows/                       the store
    STATE/serving/rows.disk/        the store, where memory has no room for it

The rows change all over several times a second and are a copy of the registry:
on a disk they would be most of what is written, and a power cut would take
them all the same. Where the link is missing, the store is begun anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from state import layout
from state.errors import UnusableDisk, reason_of

MEMORY = Path("/dev/shm")
LEAST_BYTES = 256 << 20
GROWTH = 1.25
NAME = "springtide-"
LINK = "link"
FORGOTTEN_S = 60.0
IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Place:
    """A directory for the rows of one host.

    Attributes:
        path: The store's own directory.
        in_memory: Whether it lies in memory.
        why: Why it does not, where nobody asked for that; else empty.
    """

    path: Path
    in_memory: bool
    why: str = ""


def choose(serving_dir: Path, rows_dir: str, memory: Path = MEMORY, least_bytes: int = LEAST_BYTES) -> Place:
    """Where the rows of this serving directory should lie. It makes the directory that holds the store, in memory.

    Args:
        serving_dir: Of the host; its lock is held.
        rows_dir: The setting: a directory to take whatever it is, or empty.
        memory: The directory that is taken where the setting is empty and there is room.
        least_bytes: Room that there must be at least; and a quarter more than a store takes that is there already.

    Raises:
        UnusableDisk: The directory that the setting names cannot be used.
    """
    serving_dir.mkdir(parents=True, exist_ok=True)
    if rows_dir:
        parent = Path(rows_dir).absolute()
        try:
            parent.mkdir(parents=True, exist_ok=True)
            return Place(_own(_folder(parent, serving_dir)) / layout.ROWS, disk_kind(parent) in IN_MEMORY)
        except OSError as error:
            raise UnusableDisk(
                f"serving.rows_dir: {reason_of(error)}", "correct its access rights, or name another directory"
            ) from error
    why = lack(serving_dir, memory, least_bytes)
    if not why:
        try:
            return Place(_own(_folder(memory, serving_dir)) / layout.ROWS, True)
        except OSError as error:
            why = reason_of(error)
    return on_disk(serving_dir, why)


def lack(serving_dir: Path, memory: Path = MEMORY, least_bytes: int = LEAST_BYTES) -> str:
    """Why the rows of this serving directory cannot lie in `memory`; empty where they can."""
    try:
        if disk_kind(memory) not in IN_MEMORY:
            return f"{memory} is not in memory"
        there = size(_folder(memory, serving_dir) / layout.ROWS)
        wanted = max(least_bytes, int(GROWTH * max(there, size(serving_dir / layout.ROWS))))
        room = min(shutil.disk_usage(memory).free, psutil.virtual_memory().available) + there
    except OSError as error:
        return reason_of(error)
    return "" if room >= wanted else f"{memory} has room for {_mb(room)}, and {_mb(wanted)} are wanted"


def on_disk(serving_dir: Path, why: str) -> Place:
    """The place beside the other stores; `why` it is not in memory."""
    link = serving_dir / layout.ROWS
    older = link.is_dir() and not link.is_symlink()  # as earlier releases had it
    return Place(link if older else serving_dir / layout.ROWS_DISK, False, why)


def current(serving_dir: Path) -> Place | None:
    """Where the link leads; None where it leads nowhere."""
    link = serving_dir / layout.ROWS
    if not link.is_dir():
        return None
    path = link.resolve()
    return Place(path, disk_kind(path) in IN_MEMORY)


def settle(serving_dir: Path, place: Place, anew: bool = True) -> None:
    """Lets the link lead to `place`, and removes every other store of this serving directory.

    1. With `anew`, what lies at `place` and the link does not know is removed.
    2. The link is replaced at once: a reader finds the old store or the new one.
    3. The others go; who has them open reads on.

    Args:
        serving_dir: Of the host; its lock is held.
        place: Where from now on.
        anew: Whether `place` was not filled just now.

    Raises:
        OSError: The disk refused.
    """
    link = serving_dir / layout.ROWS
    before = _target(link)
    inside = place.path.is_relative_to(serving_dir)
    if not inside:
        (place.path.parent / LINK).write_text(str(link.absolute()))
    if place.path != link and before != place.path:
        # 1.
        if anew and place.path.exists():
            shutil.rmtree(place.path)
        if link.is_dir() and not link.is_symlink():
            shutil.rmtree(link)
        # 2.
        temporary = serving_dir / f"{layout.ROWS}.link"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(place.path.relative_to(serving_dir) if inside else place.path)
        temporary.replace(link)
    # 3.
    for other in {before, _folder(MEMORY, serving_dir) / layout.ROWS, serving_dir / layout.ROWS_DISK}:
        if other is not None and other not in (place.path, link):
            _remove(other, serving_dir)


def forget(serving_dir: Path) -> None:
    """Removes the rows of this serving directory, wherever they lie; nobody uses them."""
    link = serving_dir / layout.ROWS
    target = _target(link)
    if target is None:
        shutil.rmtree(link, ignore_errors=True)
    else:
        link.unlink()
        _remove(target, serving_dir)


def remove_forgotten(parent: Path = MEMORY, now_s: float | None = None) -> list[Path]:
    """Removes what lies in memory of serving directories that are gone or have their rows elsewhere; returns what went.

    Args:
        parent: Where to look.
        now_s: Wall clock; what is younger than a minute stays.
    """
    now_s = time.time() if now_s is None else now_s
    return [one for one in _folders_in(parent) if _is_forgotten(one, now_s) and _gone(one)]


def size(store: Path) -> int:
    """The bytes that a store takes; 0 where there is none."""
    try:
        return (store / layout.DATA).stat().st_blocks * 512
    except OSError:
        return 0


def disk_kind(path: Path) -> str:
    """The kind of file system that `path` lies on, such as ext4 or tmpfs; empty where nothing tells.

    Raises:
        OSError: There is no such path.
    """
    path = path.resolve(strict=True)
    mounts = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
    return next((mounts[one] for one in (path, *path.parents) if one in mounts), "")


def _folder(parent: Path, serving_dir: Path) -> Path:
    """A directory in `parent` that no other serving directory has, nor one at the same path in another container."""
    whole = serving_dir.resolve()
    status = whole.stat()
    about = f"{whole} {status.st_dev} {status.st_ino}"
    return parent / f"{NAME}{hashlib.sha256(about.encode()).hexdigest()[:16]}"


def _own(folder: Path) -> Path:
    """The directory, which only its owner may enter.

    Raises:
        OSError: It cannot be made, or is somebody else's.
    """
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise OSError(0, "is somebody else's", str(folder)) from None
        folder.chmod(0o700)
    return folder


def _target(link: Path) -> Path | None:
    """Where a link leads, whether or not something is there; None of what is no link."""
    return link.parent / link.readlink() if link.is_symlink() else None


def _remove(store: Path, serving_dir: Path) -> None:
    """Removes a store of this serving directory, and in memory the directory that holds it."""
    if store.is_relative_to(serving_dir):
        shutil.rmtree(store, ignore_errors=True)
    elif store.parent == _folder(store.parent.parent, serving_dir):
        shutil.rmtree(store.parent, ignore_errors=True)


def _folders_in(parent: Path) -> Iterator[Path]:
    """Directories of rows in `parent` that are ours to remove."""
    for folder in sorted(parent.glob(f"{NAME}*")):
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
            yield folder


def _is_forgotten(folder: Path, now_s: float) -> bool:
    try:
        if now_s - folder.stat().st_mtime < FORGOTTEN_S:
            return False
        link = Path((folder / LINK).read_text())
        if _target(link) == folder / layout.ROWS:
            return False
    except OSError:
        pass
    return not _is_open(folder / layout.ROWS)


def _is_open(store: Path) -> bool:
    """Whether another process has the store open, also one that sees other directories than we do: LMDB locks a byte then."""
    try:
        with (store / "lock.mdb").open("r+b") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _gone(folder: Path) -> bool:
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
