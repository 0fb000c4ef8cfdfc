"""`springtide flink`: what is wrong with a line, a port or a directory is said before anything starts."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from deploy.flink import command
from deploy.kafka.configuration import free_ports
from state.disk.lock import DirectoryLock
from tests.e2e.running import ROOT


def flags(tmp_path: Path, **own: object) -> list[str]:
    values: dict[str, object] = {**free_ports(("rest_port", "job_port", "worker_port"))}
    words = [word for name, value in {**values, **own}.items() for word in (f"--flink.{name}", str(value))]
    return [*words, "--state", str(tmp_path)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["up", "--no-savepoint"], "--no-savepoint is for down"),
        (["down", "--url", "http://a:1"], "--url is for status"),
        (["status", "--url", "a:1"], "written http://HOST:PORT"),
        (["status", "--flink.rest_prt", "1"], "rest_port"),
    ],
)
def test_wrong_use_is_said(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(words) == 2
    assert says in capsys.readouterr().err


def test_a_port_that_is_taken_is_named_with_its_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert command.main(["up", *flags(tmp_path, job_port=other.getsockname()[1])]) == 1
    assert "set flink.job_port to a free port" in capsys.readouterr().err


def test_a_second_cluster_in_a_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with DirectoryLock(tmp_path / "flink"):
        assert command.main(["up", *flags(tmp_path)]) == 1
    assert "is in use by process" in capsys.readouterr().err


def test_down_where_nothing_runs_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["down", *flags(tmp_path)]) == 1
    assert "no cluster runs in" in capsys.readouterr().err
    assert not (tmp_path / "flink").exists()


HOLDER = """
import signal, sys
from pathlib import Path
from state.disk.lock import DirectoryLock
with DirectoryLock(Path(sys.argv[1])):
    print("held", flush=True)
    signal.pause()
"""


def test_down_ends_where_nobody_waits_for_the_process_of_up(tmp_path: Path) -> None:
    """What started `up` may leave it unburied when it has ended, as this test does."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "flink")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        # In a process of its own: to this one the holder is a child, whose end it would take notice of.
        line = [sys.executable, "-m", "deploy.cli", "flink", "down", *flags(tmp_path)]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[-1] == "Flink is down"
        assert psutil.Process(holder.pid).status() == psutil.STATUS_ZOMBIE
    finally:
        holder.kill()
        holder.communicate()
    assert holder.returncode == -signal.SIGTERM


def test_status_of_nothing_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["status", *flags(tmp_path)]) == 1
    assert "no JobManager answers" in capsys.readouterr().out
