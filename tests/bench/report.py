"""Writes a benchmark's figures as JSON with the machine they were taken on, and prints them.

Figures go to `build/bench/<name>.json`. A goal that the machine did not reach
is printed as such and never fails the run: the numbers are for people. Each
report contains a calibration, the time of a fixed loop, so that figures of
machines and moments of different speed can be compared.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

FOLDER = Path("build/bench")
CALIBRATION_ADDITIONS = 5_000_000


@dataclass(frozen=True)
class Figure:
    """One measured value.

    Attributes:
        value: What was measured, in `unit`.
        unit: Its unit, such as `events/s`, `ms` or `ratio`.
        goal: What the project wants, as a comparison such as `>= 80000`; empty where there is none.
    """

    value: float
    unit: str
    goal: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the goal was met; None without a goal.

        >>> Figure(90.0, "events/s", ">= 80").reached, Figure(9.0, "ms").reached
        (True, None)
        """
        if not self.goal:
            return None
        sign, bound = self.goal.split()
        return self.value >= float(bound) if sign == ">=" else self.value <= float(bound)


class Stages:
    """Says how far a bench is: each new stage, and within one at most every `every_s`.

    Args:
        name: Of the bench.
        every_s: Least time between two lines of one stage.
        output: Where to; by default the standard error.
        clock_s: A monotonic clock.

    >>> times = iter([0.0, 61.0, 62.0, 72.0])
    >>> progress = Stages("loop", 10.0, sys.stdout, lambda: next(times))
    >>> for place in (1, 2, 3):
    ...     progress.say("freshness", f"{place} of 3")
    loop: 61 s, freshness 1 of 3
    loop: 72 s, freshness 3 of 3
    """

    def __init__(
        self,
        name: str,
        every_s: float = 10.0,
        output: TextIO | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._every_s, self._output, self._clock_s = name, every_s, output or sys.stderr, clock_s
        self._begin_s = clock_s()
        self._stage, self._said_s = "", 0.0

    def say(self, stage: str, more: str = "") -> None:
        """Says where the bench is, where it is time."""
        now_s = self._clock_s()
        if stage != self._stage or now_s >= self._said_s + self._every_s:
            self._stage, self._said_s = stage, now_s
            print(
                f"{self._name}: {now_s - self._begin_s:.0f} s, {stage} {more}".rstrip(), file=self._output, flush=True
            )


def machine() -> dict[str, object]:
    """What the figures were taken on: processor, cores, memory, system, Python."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def calibration_s() -> float:
    """Wall time of 5 million additions in a Python loop, seconds."""
    begun_s = time.perf_counter()
    total = 0
    for number in range(CALIBRATION_ADDITIONS):
        total += number
    return time.perf_counter() - begun_s


def report(name: str, figures: Mapping[str, Figure], notes: Mapping[str, object] | None = None) -> Path:
    """Prints `figures` and writes them to `build/bench/<name>.json`; returns the file."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    loop_s = calibration_s()
    print(f"\n{name} ({machine()['processor']}, {os.cpu_count()} cores, 5 million additions in {loop_s:.3f} s)")
    for label, figure in figures.items():
        verdict = {True: "reached", False: "NOT REACHED", None: ""}[figure.reached]
        print(f"  {label:<52} {figure.value:>14,.3f} {figure.unit:<12} {figure.goal:<12} {verdict}")
    path = FOLDER / f"{name}.json"
    document = {
        "name": name,
        "taken_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "calibration_s": loop_s,
        "figures": {label: asdict(figure) | {"reached": figure.reached} for label, figure in figures.items()},
        "notes": dict(notes or {}),
    }
    path.write_text(json.dumps(document, indent=2) + "\n")
    return path
