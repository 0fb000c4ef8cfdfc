"""What processes write to a disk: by what the kernel charges to each of them, and by the sectors that the disk was given."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

SECTOR_BYTES = 512
WRITTEN = 9  # The column of /proc/diskstats with the sectors written.
HOUR_S = 3600.0


def charged_bytes(text: str) -> int:
    """What a process made the kernel write, less what was deleted before it was written, by its /proc/PID/io.

    >>> charged_bytes("wchar: 9000\\nwrite_bytes: 8192\\ncancelled_write_bytes: 4096\\n")
    4096
    """
    counts = {name: int(count) for name, _, count in (line.partition(": ") for line in text.splitlines())}
    return counts["write_bytes"] - counts["cancelled_write_bytes"]


def disk_bytes(text: str, major: int, minor: int) -> int | None:
    """What a disk was given since the machine's start, by /proc/diskstats; None of one that is not there.

    >>> line = " 254       0 vda 1 2 3 4 5 6 20 8 9 10 11"
    >>> disk_bytes(line, 254, 0), disk_bytes(line, 0, 37)
    (10240, None)
    """
    for columns in map(str.split, text.splitlines()):
        if columns[:2] == [str(major), str(minor)]:
            return int(columns[WRITTEN]) * SECTOR_BYTES
    return None


@dataclass(frozen=True)
class Written:
    """Bytes written since some beginning, as of one moment.

    Attributes:
        at_s: The moment, by a monotonic clock.
        charged: Process -> bytes.
        disk: Of the disk as a whole, whoever wrote; None where that cannot be read.
    """

    at_s: float
    charged: Mapping[str, int]
    disk: int | None

    @classmethod
    def now(cls, processes: Mapping[str, psutil.Process], directory: Path) -> Written:
        charged = {name: charged_bytes(Path(f"/proc/{one.pid}/io").read_text()) for name, one in processes.items()}
        device = directory.stat().st_dev
        disk = disk_bytes(Path("/proc/diskstats").read_text(), os.major(device), os.minor(device))
        return cls(time.monotonic(), charged, disk)

    def gb_per_hour(self, before: Written) -> dict[str, float]:
        """GB an hour since `before`, by process; `all of them` together, and `the disk` where that can be read.

        >>> early, late = Written(0.0, {"trainer": 0, "stream": 5}, None), Written(3.6, {"trainer": 2_000_000, "stream": 5}, 1)
        >>> late.gb_per_hour(early)
        {'trainer': 2.0, 'stream': 0.0, 'all of them': 2.0}
        """
        hours = (self.at_s - before.at_s) / HOUR_S
        found = {name: (count - before.charged.get(name, 0)) / hours / 1e9 for name, count in self.charged.items()}
        found["all of them"] = sum(found.values())
        if self.disk is not None and before.disk is not None:
            found["the disk"] = (self.disk - before.disk) / hours / 1e9
        return found
