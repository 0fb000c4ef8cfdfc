"""What a process writes is its owner's alone, and what an earlier release left open is closed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from state.disk.lock import DirectoryLock

WRITES = """
import sys
from pathlib import Path
from state.history.store import HistoryStore
from state.process.private_files import keep_private
from state.registry.control import start
from state.registry.registry import Registry
keep_private()
at = Path(sys.argv[1])
HistoryStore(at / "histories").close()
Registry(at / "registry").propose(start(actor="tester", reason="a test", now_ms=1))
"""


def rights(at: Path) -> set[str]:
    """Modes of all files and directories below `at`, in octal."""
    return {oct(path.stat().st_mode & 0o777) for path in at.rglob("*")}


def test_stores_and_registry_are_made_for_their_owner_alone(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", WRITES, str(tmp_path)], check=True, preexec_fn=lambda: os.umask(0o022))
    assert rights(tmp_path) == {"0o600", "0o700"}


def test_a_directory_that_an_earlier_release_left_open_is_closed_and_one_open_to_a_group_is_not(tmp_path: Path) -> None:
    for before, after in ((0o755, 0o700), (0o750, 0o750), (0o700, 0o700)):
        tmp_path.chmod(before)
        with DirectoryLock(tmp_path):
            assert tmp_path.stat().st_mode & 0o777 == after
