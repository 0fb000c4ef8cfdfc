"""A kernel is compiled anew when what it takes from another file has changed, and an older cache harms nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PARTS = """
from typing import NamedTuple

from state.compiled import compiled

FACTOR = {factor}


class {name}(NamedTuple):
    value: int


@compiled
def part(x):
    return {name}(x * {by})
"""
KERNEL = """
from cache_parts import FACTOR, part

from state.compiled import compiled


@compiled
def whole(x):
    return part(x).value + FACTOR


print(whole(10))
"""


def computed(folder: Path, factor: int = 1, by: int = 2, name: str = "Found") -> int:
    """What a new process computes."""
    (folder / "cache_parts.py").write_text(PARTS.format(factor=factor, by=by, name=name))
    done = subprocess.run(
        [sys.executable, str(folder / "kernel.py")],
        # Two versions within a second and of one size have one .pyc.
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_kernel_follows_what_it_takes_from_another_file(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(KERNEL)
    assert computed(tmp_path) == 21
    assert computed(tmp_path, by=3) == 31
    assert computed(tmp_path, by=3, factor=5) == 35
    # The index of an older cache names a class that is gone.
    assert computed(tmp_path, by=3, factor=5, name="Totals") == 35
