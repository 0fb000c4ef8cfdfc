"""What a process writes is its owner's alone, and what an earlier release left open is closed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from state.disk.lock import DirectoryLock
from state.process.private_files import others_may

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


def test_a_secret_that_root_gives_to_our_group_alone_is_read_by_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.touch()
    if os.geteuid() != 0:
        pytest.skip("only root's files are given so, and this is not root")
    os.chown(secret, 0, 4321)
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    for groups, mode, open_to_others in (
        ([4321], 0o440, False),
        ([4321], 0o460, True),
        ([4321], 0o444, True),
        ([], 0o440, True),
        ([], 0o400, False),
    ):
        monkeypatch.setattr(os, "getgroups", lambda groups=groups: groups)
        secret.chmod(mode)
        assert others_may(secret) is open_to_others, (groups, oct(mode))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "getgroups", lambda: [4321])
    secret.chmod(0o640)
    assert others_may(secret), "one of our own is for us alone"
