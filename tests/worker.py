"""A test process of pytest-xdist, forked from the process that has collected the tests (`tests/forked.py`).

1. execnet starts this file, with the address of the server of forks, instead of an interpreter.
2. It has the test process forked, with its own files, passes signals on and ends with it.
3. The test process runs what an interpreter would: the line that execnet sends.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path


def main() -> None:
    """Runs what comes by standard input."""
    exec(eval(sys.stdin.readline()), {"__name__": "__main__"})


if __name__ == "__main__":
    # A script finds only modules next to itself.
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests import forked

    forked.use(sys.argv[1])
    process = forked.Popen([sys.executable, "-m", "tests.worker"])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: process.send_signal(number))
    sys.exit(process.wait())
