"""Claims about the lock of a state directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from state.disk.lock import DirectoryLock
from state.errors import LockHeld

HOLD = """
import sys
from pathlib import Path
from state.disk.lock import DirectoryLock
with DirectoryLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_lock_names_the_holder(tmp_path: Path) -> None:
    with DirectoryLock(tmp_path / "state"), pytest.raises(LockHeld, match=f"process {os.getpid()} on .*, started 20"):
        DirectoryLock(tmp_path / "state").acquire()
    with DirectoryLock(tmp_path / "state"):
        pass


def test_names_are_locked_on_their_own(tmp_path: Path) -> None:
    with DirectoryLock(tmp_path), DirectoryLock(tmp_path, "other.lock"):
        assert {path.name for path in tmp_path.iterdir()} == {"lock", "other.lock"}


def test_a_killed_holder_leaves_nothing_to_clean_up(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path.cwd()
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(LockHeld, match=f"process {holder.pid} "):
            DirectoryLock(tmp_path).acquire()
        holder.kill()
        holder.wait()
    with DirectoryLock(tmp_path):
        pass
