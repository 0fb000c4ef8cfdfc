"""Logs take turns while the children write: no line is lost or cut, and the space is bounded."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from deploy.children.log_files import LogFile, LogPump


def lines_of(folder: Path, name: str) -> list[str]:
    """All lines of a log, the oldest file first; each file ends a line."""
    files = sorted(folder.glob(f"{name}.log*"), key=lambda one: -int(one.suffix[1:]) if one.suffix != ".log" else 0)
    texts = [one.read_text() for one in files]
    assert all(text.endswith("\n") for text in texts[:-1])
    return "".join(texts).splitlines()


@pytest.mark.parametrize("size", [1, 7, 50, 400])
def test_files_take_turns_between_lines_however_they_come(tmp_path: Path, size: int) -> None:
    log = LogFile(tmp_path / "one.log", 300, 1000)
    whole = "".join(f"line {number:05d}\n" for number in range(200)).encode()
    for at in range(0, len(whole), size):
        log.add(whole[at : at + size])
    assert lines_of(tmp_path, "one") == whole.decode().splitlines()
    sizes = [one.stat().st_size for one in tmp_path.iterdir()]
    assert len(sizes) > 3
    assert max(sizes) <= 300 + max(size, len("line 00000\n"))


def test_no_more_files_are_kept_than_asked_for(tmp_path: Path) -> None:
    for older in (0, 1, 3):
        log = LogFile(tmp_path / f"kept{older}.log", 100, older)
        for number in range(200):
            log.add(f"line {number:05d}\n".encode())
        found = lines_of(tmp_path, f"kept{older}")
        assert len(list(tmp_path.glob(f"kept{older}.log*"))) == older + 1
        assert found == [f"line {number:05d}" for number in range(200 - len(found), 200)]


def test_what_children_say_at_once_is_in_their_logs_once_they_ended(tmp_path: Path) -> None:
    pump = LogPump(20_000, 100)
    code = "import os, sys\nfor n in range(20000): os.write(1 + n % 2, f'{sys.argv[1]} {n}\\n'.encode())"
    children = []
    for name in ("left", "right"):
        writes = pump.open(tmp_path / f"{name}.log")
        children.append(subprocess.Popen([sys.executable, "-c", code, name], stdout=writes, stderr=writes))
        os.close(writes)
    assert [child.wait(60) for child in children] == [0, 0]
    pump.catch_up()
    for name in ("left", "right"):
        assert lines_of(tmp_path, name) == [f"{name} {number}" for number in range(20_000)]
        assert len(list(tmp_path.glob(f"{name}.log*"))) > 1
    assert [one.name for one in threading.enumerate()].count("logs") >= 1


def test_a_full_disk_holds_no_child_up_and_is_told_in_the_log(tmp_path: Path) -> None:
    path = tmp_path / "one.log"
    log = LogFile(path, 1000, 1)
    log.add(b"before\n")
    path.rename(tmp_path / "aside")
    path.mkdir()
    log.add(b"lost\nlost\n")
    path.rmdir()
    (tmp_path / "aside").rename(path)
    log.add(b"after\n")
    assert path.read_text() == "before\n(3 lines could not be written here)\nafter\n"
