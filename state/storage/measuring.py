"""Measures what a part takes on its disk, and offers that on /metrics: looked at when asked, and not again for some seconds."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry

from state.config.settings import Settings
from state.metrics import StorageMetrics
from state.storage import shares

FRESH_S = 5.0
_BLOCK = 512  # of st_blocks, whatever the file system's own are


def used_bytes(folders: Iterable[Path]) -> int:
    """What the files under `folders` take on their disks; a file with holes counts without them.

    >>> used_bytes([Path("no/such/folder")])
    0
    """
    total, left = 0, [os.fspath(one) for one in folders]
    while left:
        # What is removed while we look takes nothing.
        with contextlib.suppress(OSError), os.scandir(left.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * _BLOCK
    return total


def free_bytes(folder: Path) -> int:
    """The bytes free where `folder` is or will be, for whoever asks.

    Raises:
        OSError: The disk cannot be asked.
    """
    return shutil.disk_usage(_existing(folder)).free


def disk_bytes(folder: Path) -> int:
    """The bytes of the disk where `folder` is or will be.

    Raises:
        OSError: The disk cannot be asked.
    """
    return shutil.disk_usage(_existing(folder)).total


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _told(ask: Callable[[Path], int], folder: Path) -> float:
    """What the disk says; NaN where it cannot be asked, so that all else is told all the same."""
    try:
        return float(ask(folder))
    except OSError:
        return math.nan


class PartUse:
    """What one part takes, measured at most every `FRESH_S`. Any thread may call it.

    Args:
        folders: Its directories.
        clock: Monotonic seconds.
    """

    def __init__(self, folders: Sequence[Path], clock: Callable[[], float] = time.monotonic) -> None:
        self._folders, self._clock = folders, clock
        self._used, self._due_s = 0, float("-inf")

    def __call__(self) -> float:
        """Its bytes."""
        now_s = self._clock()
        if now_s >= self._due_s:
            self._used = used_bytes(self._folders)
            self._due_s = now_s + FRESH_S
        return float(self._used)


def offer(collected: CollectorRegistry, settings: Settings, parts: Iterable[str]) -> StorageMetrics:
    """Offers used bytes, limit and disk of the parts that this process owns.

    Args:
        collected: The metrics of this process.
        settings: The effective settings.
        parts: Names of `state.storage.shares`.
    """
    metrics = StorageMetrics(collected)
    for part in parts:
        folders = [settings.stream_dir] if part == shares.STREAM else shares.folders(settings, part)
        metrics.used_bytes.labels(part).set_function(PartUse(folders))
        metrics.free_bytes.labels(part).set_function(partial(_told, free_bytes, folders[0]))
        metrics.disk_bytes.labels(part).set_function(partial(_told, disk_bytes, folders[0]))
        metrics.limit_bytes.labels(part).set(shares.limit_bytes(settings, part))
        metrics.waiting.labels(part).set(0)
    return metrics
