"""Measures the disk use of a part and exports it on /metrics; measures on request, at most once every few seconds."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from prometheus_client import CollectorRegistry

from state.config.settings import Settings
from state.metrics import StorageMetrics
from state.storage import shares

FRESH_S = 5.0
_BLOCK = 512  # the unit of st_blocks, independent of the file system's block size


def used_bytes(folders: Iterable[Path]) -> int:
    """The disk space of the files under `folders`; holes of sparse files do not count."""
    total, to_visit = 0, [os.fspath(folder) for folder in folders]
    while to_visit:
        # Files that are removed meanwhile take no space.
        with contextlib.suppress(OSError), os.scandir(to_visit.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        to_visit.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * _BLOCK
    return total


def free_bytes(folder: Path) -> int:
    """The free bytes of the disk where `folder` is or will be.

    Raises:
        OSError: The disk cannot be queried.
    """
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _exported(field: Literal["free", "total"], folder: Path) -> float:
    """A property of the disk; NaN if it cannot be queried, so that the other metrics are still exported."""
    try:
        return float(getattr(shutil.disk_usage(_existing(folder)), field))
    except OSError:
        return math.nan


class PartUse:
    """The disk use of one part's directories, measured at most every `FRESH_S`. Thread-safe."""

    def __init__(self, folders: Sequence[Path], clock: Callable[[], float] = time.monotonic) -> None:
        self._folders, self._clock = folders, clock
        self._used, self._due_s = 0, float("-inf")

    def __call__(self) -> float:
        """Returns the bytes."""
        now_s = self._clock()
        if now_s >= self._due_s:
            self._used = used_bytes(self._folders)
            self._due_s = now_s + FRESH_S
        return float(self._used)


def offer(collected: CollectorRegistry, settings: Settings, parts: Iterable[str]) -> StorageMetrics:
    """Exports used bytes, limit and disk of the parts that this process owns."""
    metrics = StorageMetrics(collected)
    for part in parts:
        folders = [settings.stream_dir] if part == shares.STREAM else shares.folders(settings, part)
        metrics.used_bytes.labels(part).set_function(PartUse(folders))
        metrics.free_bytes.labels(part).set_function(partial(_exported, "free", folders[0]))
        metrics.disk_bytes.labels(part).set_function(partial(_exported, "total", folders[0]))
        metrics.limit_bytes.labels(part).set(shares.limit_bytes(settings, part))
        metrics.waiting.labels(part).set(0)
    return metrics
