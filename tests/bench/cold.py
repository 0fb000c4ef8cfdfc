"""How long an installed checkout takes from `springtide up` to the first answer by learned weights, in a fresh state directory.

    python -m tests.bench.cold [--state DIRECTORY] [--installed]

Kafka's jars are in place. The bench removes the machine code of all kernels from this checkout, then measures:

1. A start that compiles them.
2. What the installation does (`python -m state.kernels --all`), with the machine code removed again.
3. A start after that. `--installed` measures only 2 and 3.

For each start it prints what `up` and the processes report, on one time axis, and the processor time of each process.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import psutil

from state.kernels import PACKAGES
from tests.bench.report import Figure, report
from tests.e2e.running import ROOT, Loop

PATIENCE_S = 300.0
POLL_S = 0.1
TIMED = re.compile(r"^(\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[.,]\d+)Z? (.*)")
USER = "shopper-1"


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--state", type=Path, help="keeps states and logs there")
    parser.add_argument("--installed", action="store_true", help="only a start after the installation")
    options = parser.parse_args()
    folder = options.state or Path(tempfile.mkdtemp(prefix="springtide-cold-"))
    figures: dict[str, Figure] = {}
    if not options.installed:
        remove_machine_code()
        figures |= {f"without kernels: {part}": figure for part, figure in started(folder / "without").items()}
    remove_machine_code()
    begun_s = time.monotonic()
    subprocess.run([sys.executable, "-m", "state.kernels", "--all"], cwd=ROOT, check=True)
    figures["installation of kernels"] = Figure(time.monotonic() - begun_s, "s")
    figures |= {f"installed: {part}": figure for part, figure in started(folder / "installed").items()}
    report("cold", figures)


def remove_machine_code() -> None:
    """Removes what was compiled of this checkout's kernels."""
    for package in PACKAGES:
        for file in [*(ROOT / package).rglob("*.nbi"), *(ROOT / package).rglob("*.nbc")]:
            file.unlink()


def started(directory: Path) -> dict[str, Figure]:
    """Starts a loop in a new directory and stops it once it answers by learned weights; returns the figures."""
    directory.mkdir(parents=True)
    loop = Loop(directory, {})
    begun_s, begun = time.monotonic(), time.time()
    first_s = 0.0
    used: dict[str, tuple[float, float]] = {}
    loop.begin()
    try:
        while True:
            answer = loop.profile(USER)
            taken_s = time.monotonic() - begun_s
            first_s = first_s or (taken_s if answer else 0.0)
            if answer and any(answer["version"]["sources"].values()):
                break
            if not loop.running or taken_s > PATIENCE_S:
                raise RuntimeError(f"no answer by learned weights after {taken_s:.0f} s:\n{loop.said()}\n{loop.logs()}")
            used |= processor_times(loop, begun_s)
            time.sleep(POLL_S)
        used |= processor_times(loop, begun_s)
    finally:
        if loop.running:
            loop.stop()
    print(timeline(loop, begun))
    for name, (at_s, cpu_s) in sorted(used.items(), key=lambda item: -item[1][1]):
        print(f"  {cpu_s:6.1f} cpu-s until {at_s:5.1f} s  {name}")
    return {
        "first answer": Figure(first_s, "s"),
        "first answer by learned weights": Figure(taken_s, "s", "<= 26"),
        "processor time of all processes": Figure(sum(cpu_s for _, cpu_s in used.values()), "cpu-s"),
    }


def processor_times(loop: Loop, begun_s: float) -> dict[str, tuple[float, float]]:
    """Command and id of each process -> seconds since the start, and its processor time so far."""
    found = {}
    for process in loop.processes():
        try:
            words, times = process.cmdline(), process.cpu_times()
        except psutil.Error:
            continue
        command = words[words.index("-m") + 1] if "-m" in words else " ".join(words)[-40:]
        found[f"{command} ({process.pid})"] = (time.monotonic() - begun_s, times.user + times.system)
    return found


def timeline(loop: Loop, begun: float) -> str:
    """What `up` and the processes logged, in the order of time."""
    lines = []
    for path in sorted(loop.settings.logs_dir.glob("*.log")):
        for line in path.read_text().splitlines():
            if timed := TIMED.match(line):
                at = datetime.fromisoformat(timed[1].replace(",", ".") + "+00:00").timestamp() - begun
                lines.append((at, f"{at:7.1f} s  {path.stem:<10} {timed[2][:170]}"))
    return "\n".join([loop.said(), *(line for _, line in sorted(lines))])


if __name__ == "__main__":
    main()
