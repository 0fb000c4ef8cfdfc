"""Disks that refuse: small ones that fill up, read-only ones, directories of somebody else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from state.disk import memory_place as place
from state.disk.lmdb_store import LmdbStore

ROOT = Path(__file__).parents[1]
NOBODY = 65534


class Disk:
    """A file system of its own, in memory.

    Attributes:
        path: Where it is mounted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def remount(self, options: str) -> None:
        """Changes it: `size=8m`, `ro`, `rw`."""
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True)

    def fill(self) -> Path:
        """Takes all of its room; returns the file to delete."""
        file = self.path / "filler"
        with file.open("wb", buffering=0) as filler:
            try:
                while filler.write(bytes(4096)):
                    pass
            except OSError:
                return file
        raise AssertionError("the disk never filled up")


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Disk]:
    """A disk of `size` at `path`; skips the test where nothing may be mounted (no root, no Linux)."""
    path.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small disk needs root")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def crash(store: LmdbStore) -> None:
    """Leaves what kill -9 leaves: what the kernel has, without a sync or a mark."""
    store._env.close()


def forget_memory(under: Path) -> None:
    """Removes the stores in memory of all links below `under`; nobody uses them."""
    for folder in Path(place.MEMORY).glob(f"{place.NAME}*"):
        with suppress(OSError):
            if Path((folder / place.LINK).read_text()).is_relative_to(under):
                shutil.rmtree(folder)


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """A directory whose syncs cost nothing, where there is one: for tests that make hundreds of stores, and pull no plug."""
    memory = place.MEMORY if Path(place.MEMORY).is_dir() else None
    with tempfile.TemporaryDirectory(prefix="tests-of-springtide-", dir=memory) as folder:
        yield Path(folder)


@contextmanager
def open_folder() -> Iterator[Path]:
    """A directory that other users may enter, which pytest's are not."""
    path = Path(tempfile.mkdtemp(prefix="springtide-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def as_nobody(imports: str, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a Python script without root's rights; as whoever we are where that is not root."""
    drop = f"import os\nif os.geteuid() == 0:\n    os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
    return subprocess.run(
        [sys.executable, "-c", f"{imports}\n{drop}\n{script}", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
