"""A worker of release 0.1.0, whose modules have other names, on stores that its own bench fills.

It is run from a checkout of that release, with this environment's packages.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.answers.stores import worker

_FILL = """
import sys
from dataclasses import replace
from pathlib import Path
from state.config import Settings
from tests.bench.serving import fill

folder, users, events = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
settings = Settings()
Path(folder).mkdir()
fill(replace(settings, paths=replace(settings.paths, state=folder)), users, events)
"""


@contextmanager
def release(checkout: Path, folder: Path, users: int, events: int, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Its process, once it is ready.

    Args:
        checkout: Of release 0.1.0.
        folder: A state directory to make.
        users: Who have histories.
        events: Of each.
        port: Where it listens.
    """
    line = [sys.executable, "-c", _FILL, str(folder), str(users), str(events)]
    subprocess.run(line, cwd=checkout, check=True)
    with worker(str(folder), port, checkout) as (process, _):
        yield process
