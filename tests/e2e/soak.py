"""The loop under load for half an hour: no process grows, nothing lags, no descriptor and no thread is left behind.

    python -m tests.e2e.soak [--minutes 30] [--rate 10000] [--warm-minutes 5]

Memory is what a process has for itself (RssAnon of /proc): pages of a store or
of a log belong to the kernel, which takes them back. The last quarter of the
time is compared with the first quarter after the warm-up, by medians. What is
kept for a time is full by then: a user's latest events, of which each shopper
makes so many in two minutes, and serving's older versions, for three minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from state.process.log_lines import ProgressLine
from tests.disks import forget_memory
from tests.e2e.running import MODULES, Loop
from tests.written import Written

EVERY_S = 5.0
LINE_EVERY_S = 15.0
MOST_GROWTH = 0.02
# A batch that is under way when one looks is no lag.
MOST_LAG_S = 1.0
SEGMENT = (".log", ".index", ".timeindex", ".txnindex", ".snapshot", ".deleted")
"""What files of the broker's segments are called."""

ANONYMOUS = re.compile(r"^RssAnon:\s+(\d+) kB", re.M)


def parts(loop: Loop) -> dict[str, psutil.Process]:
    """The processes of the loop by name."""
    pids = {name: loop.pid(name) for name in MODULES}
    pids["kafka"] = next((process.pid for process in loop.processes() if "java" in process.name()), None)
    return {name: psutil.Process(pid) for name, pid in pids.items() if pid is not None}


@dataclass(frozen=True)
class Look:
    """What a process had at one moment.

    Attributes:
        memory_kb: Of its own, kB.
        descriptors: Open ones, without the files of the broker's segments, which are as many as its topics keep.
        threads: Running ones.
    """

    memory_kb: int
    descriptors: int
    threads: int

    @classmethod
    def at(cls, process: psutil.Process) -> Look:
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = ANONYMOUS.search(status)
        assert found is not None, "Linux says RssAnon since 4.5"
        return cls(int(found[1]), descriptors(process.pid), process.num_threads())


def descriptors(pid: int) -> int:
    """Open descriptors of a process that are no segment of a topic."""
    count = 0
    for one in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            count += Path(str(one.readlink()).removesuffix(" (deleted)")).suffix not in SEGMENT
    return count


def faults(name: str, looks: Sequence[Look]) -> list[str]:
    """What grew in one process, in words.

    >>> steady = [Look(100_000, 20, 8)] * 8
    >>> faults("stream", steady)
    []
    >>> faults("stream", [*steady[:4], *[Look(103_000, 21, 8)] * 4])
    ['stream: memory 97.7 -> 100.6 MiB (+3.0 %)', 'stream: descriptors 20 -> 21']
    """
    quarter = max(1, len(looks) // 4)
    first, last = looks[:quarter], looks[-quarter:]
    found = []
    before, after = (statistics.median(one.memory_kb for one in part) for part in (first, last))
    if after > before * (1 + MOST_GROWTH):
        grown = 100 * (after / before - 1)
        found.append(f"{name}: memory {before / 1024:.1f} -> {after / 1024:.1f} MiB (+{grown:.1f} %)")
    for what in ("descriptors", "threads"):
        before, after = (statistics.median(getattr(one, what) for one in part) for part in (first, last))
        if after > before:
            found.append(f"{name}: {what} {before:g} -> {after:g}")
    return found


def lag(loop: Loop) -> tuple[float, float]:
    """Clicks that the stream has not read, and records that the trainer has not learned."""
    stream, trainer = loop.metrics("stream"), loop.metrics("trainer")
    return (
        stream.value("springtide_stream_lag_events") or 0.0,
        trainer.value("springtide_trainer_lag_records") or 0.0,
    )


def soak(
    loop: Loop, running: Mapping[str, psutil.Process], minutes: float, warm_minutes: float
) -> tuple[dict[str, list[Look]], list[tuple[float, float]]]:
    """Looks at all processes every few seconds; returns the looks and lags after the warm-up."""
    looks: dict[str, list[Look]] = {name: [] for name in running}
    lags: list[tuple[float, float]] = []
    progress, begin = ProgressLine(sys.stderr, LINE_EVERY_S), time.monotonic()
    while (elapsed_s := time.monotonic() - begin) < 60 * minutes:
        events, records = lag(loop)
        now = {name: Look.at(process) for name, process in running.items()}
        memory = ", ".join(f"{name} {one.memory_kb // 1024}" for name, one in now.items())
        line = f"{elapsed_s / 60:4.1f} of {minutes:g} min, lag {events:.0f} clicks, MiB: {memory}"
        progress.show(partial(str, line))
        if elapsed_s >= 60 * warm_minutes:
            lags.append((events, records))
            for name, one in now.items():
                looks[name].append(one)
        time.sleep(EVERY_S)
    return looks, lags


def main() -> int:
    """Soaks the loop; returns 1 where something grew."""
    parser = argparse.ArgumentParser(description="The loop under load for a long time.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warm-minutes", type=float, default=5.0)
    parser.add_argument("--rate", type=float, default=10_000.0)
    options = parser.parse_args()
    if options.minutes <= options.warm_minutes:
        parser.error(f"--minutes {options.minutes:g} is not longer than --warm-minutes {options.warm_minutes:g}")
    # Kept where the soak broke off: the logs in it say why.
    directory = Path(tempfile.mkdtemp(prefix="springtide-soak-"))
    full = {"features.history": 64, "serving.keep_s": 180}
    own = {"shoppers.rate": options.rate, "shoppers.users": 20_000, "bootstrap.min_rows": 2000, **full}
    loop = Loop(directory, own)
    print(f"state and logs: {directory}", file=sys.stderr)
    try:
        loop.start()
        running = parts(loop)
        before = Written.now(running, directory)
        looks, lags = soak(loop, running, options.minutes, options.warm_minutes)
        written = Written.now(running, directory).gb_per_hour(before)
    finally:
        if loop.process is not None:
            loop.stop()
    forget_memory(directory)
    shutil.rmtree(directory)
    found = [fault for name, theirs in looks.items() for fault in faults(name, theirs)]
    behind, unlearned = (statistics.median(one[part] for one in lags) for part in (0, 1))
    if behind > MOST_LAG_S * options.rate:
        found.append(f"the stream lags by {behind:.0f} clicks")
    print(f"{options.minutes:g} min at {options.rate:g} clicks/s: lag {behind:.0f} clicks, {unlearned:.0f} records")
    for name, theirs in looks.items():
        first, last = theirs[0], theirs[-1]
        print(
            f"  {name:<9} {first.memory_kb / 1024:7.1f} -> {last.memory_kb / 1024:7.1f} MiB, "
            f"{first.descriptors} -> {last.descriptors} descriptors, {first.threads} -> {last.threads} threads"
        )
    print("GB an hour written: " + ", ".join(f"{name} {value:.1f}" for name, value in written.items()))
    print("\n".join(found) if found else "nothing grew")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
