"""Divides `storage.budget_gb` among the parts, limits each store and topic, and measures what a part uses.

| part | share | contents | enforced by |
|---|---|---|---|
| `kafka` | 40 % | the local Kafka: clicks, training log, dead letters, attributes | each topic's `retention.bytes` |
| `registry` | 25 % | versions, bases, control, snapshots of histories | the compactor thins, and drops the oldest first |
| `stream` | 15 % | attributes; histories, while stopped or if memory has no space | the stores' maps |
| `serving` | 15 % | attributes, segments; likewise histories; rows if memory has no space | the stores' maps |
| `logs` | 5 % | one log per process, and older ones | rotation by size |

Stores in memory take no disk space until a clean stop writes them to disk. A part is kept at `KEPT` of its share, so a
part above 90 % shows that its mechanism fails. An external Kafka cluster is not limited.

An action that a full disk refuses is retried until there is space; the wait is logged once and counted.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from prometheus_client import CollectorRegistry

from state import layout
from state.disk import memory_place
from state.errors import RegistryError, StoreError, StoreFull
from state.metrics import StorageMetrics

if TYPE_CHECKING:
    from state.config.settings import Settings


KAFKA, REGISTRY, STREAM, SERVING, LOGS = "kafka", "registry", "stream", "serving", "logs"
SHARES: Mapping[str, float] = {KAFKA: 0.40, REGISTRY: 0.25, STREAM: 0.15, SERVING: 0.15, LOGS: 0.05}
KEPT = 0.8

# Shares of a part's share; the rest is for small files.
_STORES: Mapping[str, Mapping[str, float]] = {
    STREAM: {layout.HISTORIES: 0.85, layout.ATTRIBUTES: 0.15},
    SERVING: {layout.HISTORIES: 0.65, layout.ATTRIBUTES: 0.1, layout.ROWS: 0.2, layout.SEGMENTS: 0.04},
}
_PAGE = 4096
# A store that was larger than its share before limits existed keeps working, and gets this much space to shrink.
_SLACK, _SLACK_BYTES = 1.05, 64 << 20

FRESH_S = 5.0
_BLOCK = 512  # the unit of st_blocks, independent of the file system's block size


def budget_bytes(settings: Settings) -> int:
    """The whole budget."""
    return int(settings.storage.budget_gb * 1e9)


def limit_bytes(settings: Settings, part: str) -> int:
    """The share of a part."""
    return int(budget_bytes(settings) * SHARES[part])


def kept_bytes(settings: Settings, part: str) -> int:
    """The target size of a part, for code that removes the oldest data."""
    return int(limit_bytes(settings, part) * KEPT)


def store_bytes(settings: Settings, part: str, store: str) -> int:
    """Maximum size of a store of a part, in whole pages."""
    return int(limit_bytes(settings, part) * _STORES[part][store]) // _PAGE * _PAGE


def map_bytes(settings: Settings, part: str, store: str, folder: Path) -> int:
    """The map size with which the writer opens a store: its share, or slightly more than its present size.

    `part` is `stream` or `serving`, `store` a name in `state/layout.py`, and `folder` the store's directory, if it exists.
    """
    present_bytes = memory_place.size(folder)
    wanted = max(store_bytes(settings, part, store), int(present_bytes * _SLACK) + _SLACK_BYTES if present_bytes else 0)
    return -(-wanted // _PAGE) * _PAGE


def folders(settings: Settings, part: str) -> list[Path]:
    """The directories of a part; for the stream, those of all streams under this state directory."""
    if part == STREAM:
        return [path.parent for path in layout.streams(settings.state_dir)]
    named = {
        KAFKA: settings.kafka_dir,
        REGISTRY: settings.registry_dir,
        SERVING: settings.serving_dir,
        LOGS: settings.logs_dir,
    }
    return [named[part]]


def used_bytes(folders: Iterable[Path]) -> int:
    """The disk space of the files under `folders`; holes of sparse files do not count."""
    total, to_visit = 0, [os.fspath(folder) for folder in folders]
    while to_visit:
        # Files that are removed meanwhile take no space.
        with suppress(OSError), os.scandir(to_visit.pop()) as entries:
            for entry in entries:
                with suppress(OSError):
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
        owned = [settings.stream_dir] if part == STREAM else folders(settings, part)
        metrics.used_bytes.labels(part).set_function(PartUse(owned))
        metrics.free_bytes.labels(part).set_function(partial(_exported, "free", owned[0]))
        metrics.disk_bytes.labels(part).set_function(partial(_exported, "total", owned[0]))
        metrics.limit_bytes.labels(part).set(limit_bytes(settings, part))
        metrics.waiting.labels(part).set(0)
    return metrics


RETRY_S = 0.5
Done = TypeVar("Done")
logger = logging.getLogger(__name__)


def is_full(error: BaseException) -> bool:
    """Whether an error, or one of its causes, means that a disk or store is full.

    >>> is_full(OSError(28, "No space left on device")), is_full(OSError(5, "Input/output error"))
    (True, False)
    >>> is_full(StoreFull("the map is full"))
    True
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, StoreFull):
            return True
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        cause = cause.__cause__
    return False


@contextmanager
def unless_full(say: Callable[[str], object]) -> Iterator[None]:
    """Ends the block without an exception if the disk is full, and reports the error by `say`; callers must retry."""
    try:
        yield
    except (StoreError, RegistryError, OSError) as error:
        if not is_full(error):
            raise
        say(str(error))


class Room:
    """Waits for disk space for one part of a process. One thread calls `wait_for`.

    Args:
        part: Name of the part in `state.storage`.
        sleep: Sleeps for the given seconds; returns True if the wait is to end.
        say: A logger's method: takes a format string and its arguments.

    Attributes:
        waits: Whether an action was refused and has not succeeded since.
    """

    def __init__(
        self,
        part: str,
        metrics: StorageMetrics,
        sleep: Callable[[float], bool],
        say: Callable[..., object] = logger.warning,
    ) -> None:
        self._part, self._metrics, self._sleep, self._say = part, metrics, sleep, say
        self.waits = False

    def wait_for(self, act: Callable[[], Done], activity: str) -> Done:
        """Retries `act` while there is no disk space.

        A refused `act` must have changed nothing; `activity` names it in the log.

        Raises:
            StoreFull, UnusableRegistry, OSError: There is no space, and the wait is to end.
            Exception: Any other error of `act`.
        """
        while True:
            try:
                result = act()
            except (StoreError, RegistryError, OSError) as error:
                if not is_full(error):
                    raise
                self.refused(error, activity)
                if self._sleep(RETRY_S):
                    raise
            else:
                self.found(activity)
                return result

    def refused(self, error: BaseException, activity: str) -> None:
        """Records that there is no space; logs and counts it if that is new."""
        if not self.waits:
            self.waits = True
            self._metrics.waits.labels(self._part).inc()
            self._metrics.waiting.labels(self._part).inc()
            self._say("%s waits for space: %s", activity, error)

    def found(self, activity: str) -> None:
        """Records that there is space; logs it if that is new."""
        if self.waits:
            self.waits = False
            self._metrics.waiting.labels(self._part).dec()
            self._say("%s continues: there is space again", activity)
