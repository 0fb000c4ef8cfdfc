"""How long it takes from `git clone` to the first answer: with nothing cached, with warm caches, and a second start.

    python -m tests.bench.start

Clones the last commit into a temporary directory and runs `make run` there as a
new user does, in a home directory that is empty at first: packages and Kafka
come over the network. The clock stops at the first answer of `/v1/profiles`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from deploy.kafka.configuration import free_ports
from tests.bench.report import Figure, report
from tests.e2e.running import PORTS, ROOT

PATIENCE_S = 900.0
LOOK_S = 0.1


def main() -> None:
    """Measures and reports."""
    with tempfile.TemporaryDirectory(prefix="springtide-start-") as folder:
        home, clone = Path(folder, "home"), Path(folder, "clone")
        home.mkdir()
        figures = {
            "clone to first answer, nothing cached": from_clone(clone, home),
            "second start to first answer": to_first_answer(clone, home),
        }
        shutil.rmtree(clone)
        figures["clone to first answer, packages and Kafka cached"] = from_clone(clone, home)
    report("start", {name: Figure(taken, "s") for name, taken in figures.items()})


def from_clone(clone: Path, home: Path) -> float:
    """Seconds from a clone to its first answer; the loop is stopped again."""
    begin = time.monotonic()
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    cloned_s = time.monotonic() - begin
    return cloned_s + to_first_answer(clone, home)


def to_first_answer(clone: Path, home: Path) -> float:
    """Seconds from `make run` in `clone` to the first answer; the loop is stopped again.

    Raises:
        RuntimeError: `make run` ended, or gave no answer in time.
    """
    ports = free_ports(PORTS)
    flags = " ".join(f"--{name} {port}" for name, port in ports.items())
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SPRINGTIDE_", "MAKE"))}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    python = Path(sys.base_prefix, "bin", "python3.11")
    log = home / "run.log"
    url = f"http://127.0.0.1:{ports['serving.port']}/v1/profiles/shopper-1"
    begin = time.monotonic()
    with log.open("wb") as output:
        command = ["make", "run", f"PYTHON={python}", f"ARGS={flags}"]
        # Ctrl-C reaches the whole group of a terminal; a group of its own keeps this process out of it.
        run = subprocess.Popen(
            command, cwd=clone, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        while not answers(url):
            if run.poll() is not None or time.monotonic() - begin > PATIENCE_S:
                raise RuntimeError(f"`make run` gave no answer: {log.read_text()[-2000:]}")
            time.sleep(LOOK_S)
        return time.monotonic() - begin
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGINT)
            run.wait(60)


def answers(url: str) -> bool:
    """Whether there is a profile at `url`."""
    try:
        with urllib.request.urlopen(url, timeout=1.0) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    main()
