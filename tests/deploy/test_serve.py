"""Serving on a host: its processes start and end together."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from deploy.serve import run as run_serving
from state.errors import ProcessFailed

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_serving_stops_its_processes_together(tmp_path: Path) -> None:
    looks: list[int] = []

    def stopping() -> bool:
        looks.append(1)
        return len(looks) > 1

    run_serving([("applier", SLEEP), ("worker 0", SLEEP)], os.environ, stopping)


def test_serving_ends_when_one_of_its_processes_does() -> None:
    dead = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(ProcessFailed, match=r"worker 0 ended unasked \(exit 3\)"):
        run_serving([("applier", SLEEP), ("worker 0", dead)], os.environ, lambda: False)
