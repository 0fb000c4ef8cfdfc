"""The Flink cluster on this machine: its command, its settings and what status reports of its jobs."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
import yaml

from deploy import java_jars
from deploy.flink import command
from deploy.flink.command import EMPTIED, FIXED, configuration, ports, process_plans
from deploy.java_jars import FLINK, SERVICES, Product, merge, merged_jar
from state.config.sections import FlinkSettings, Paths
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import FlinkFailed
from state.flink import Checkpoint, Job, Overview
from state.process.network import free_ports
from tests.e2e.running import ROOT


def flags(tmp_path: Path, **own: object) -> list[str]:
    values: dict[str, object] = {**free_ports(("rest_port",))}
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
        assert command.main(["up", *flags(tmp_path, rest_port=other.getsockname()[1] - 18)]) == 1
    assert "set flink.rest_port to a free port" in capsys.readouterr().err


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


DIRECTORY = Path("/state/flink")


def read(settings: FlinkSettings) -> dict[str, object]:
    return dict(yaml.safe_load(configuration(settings, DIRECTORY, 6123)))


def test_no_line_is_said_twice() -> None:
    names = re.findall(r"^([\w.-]+):", configuration(FlinkSettings(), DIRECTORY, 6123), re.MULTILINE)
    assert len(names) > 20
    assert sorted(names) == sorted(set(names))


def test_what_any_cluster_is_told_is_what_the_measured_traps_ask_for() -> None:
    told = yaml.safe_load(FIXED.read_text())
    assert told["pipeline.operator-chaining.enabled"] is False
    assert told["heartbeat.timeout"] == 6000 > 2 * told["heartbeat.interval"]
    assert told["restart-strategy.type"] == "exponential-delay"
    assert told["execution.checkpointing.externalized-checkpoint-retention"] == "RETAIN_ON_CANCELLATION"
    # Places and sizes are the cluster's own.
    assert not [name for name in told if name.endswith(("dir", "dirs", "port", "host", "address", "size"))]


def test_it_listens_on_loopback_alone() -> None:
    told = read(FlinkSettings())
    hosts = {name: value for name, value in told.items() if name.endswith(("host", "address"))}
    assert len(hosts) >= 6
    assert set(hosts.values()) == {"127.0.0.1"}


def test_sizes_are_those_of_the_settings() -> None:
    told = read(FlinkSettings(heap_mb=400))
    assert told["state.backend.type"] == "hashmap"
    heaps = [told[f"taskmanager.memory.{part}.heap.size"] for part in ("framework", "task")]
    assert sum(int(str(size).removesuffix("m")) for size in heaps) == 400
    assert told["taskmanager.memory.managed.size"] == "0m"


def test_each_process_has_a_place_of_its_own_for_what_it_leaves_behind() -> None:
    plans = process_plans(FlinkSettings(task_managers=2), DIRECTORY, Path("/jar"), "/java", "/python")
    assert [plan.name for plan in plans] == ["job-manager", "workers", "task-manager-1", "task-manager-2", "job-server"]
    of_java = [plan for plan in plans if "/java" in plan.command]
    assert len(of_java) == 4
    for plan in of_java:
        assert plan.command[:5] == (*EMPTIED, f"/state/flink/tmp/{plan.name}", "/java")
        assert f"-Djava.io.tmpdir=/state/flink/tmp/{plan.name}" in plan.command
    ids = [word for plan in plans for word in plan.command if word.startswith("taskmanager.resource-id=")]
    assert ids == ["taskmanager.resource-id=task-manager-1", "taskmanager.resource-id=task-manager-2"]


def test_ports_are_those_of_the_settings() -> None:
    settings = FlinkSettings(rest_port=1)
    assert [port.port for port in ports(settings)] == [1, 19, 18]
    plans = {plan.name: plan.command for plan in process_plans(settings, DIRECTORY, Path("/jar"), "/java", "/python")}
    assert plans["workers"][-1] == "18"
    assert {"--job-port=19", "--flink-master=127.0.0.1:1"} <= set(plans["job-server"])


def jar(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as made:
        for name, text in files.items():
            made.writestr(name, text)
    return path


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Product:
    """A lock file with two jars that are there."""
    found = {
        "org.a:one:1": jar(tmp_path / "one.jar", {"a/One.class": "1", f"{SERVICES}a.Store": "a.One\n"}),
        "org.a:two:1": jar(tmp_path / "two.jar", {"a/Two.class": "2", f"{SERVICES}a.Store": "a.Two"}),
    }
    monkeypatch.setattr(java_jars, "_repository", lambda: found.__getitem__)
    lock = tmp_path / "jars.lock"
    java_jars.write(lock, {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()})
    return replace(FLINK, lock=lock)


def test_the_lock_file_has_what_a_cluster_is_made_of() -> None:
    locked = java_jars.locked(FLINK.lock)
    assert set(java_jars.CONSISTS_OF) <= set(locked)
    assert [digest for digest in locked.values() if not re.fullmatch(r"[0-9a-f]{64}", digest)] == []
    for part in ("flink-runtime", "flink-streaming-java", "flink-rpc-akka-loader", "beam-runners-java-job-service"):
        assert any(name.split(":")[1] == part for name in locked), part
    # Two bindings would each take the other's lines.
    assert [name for name in locked if "slf4j-simple" in name or "log4j-slf4j" in name] == [
        "org.slf4j:slf4j-simple:1.7.30"
    ]


def test_services_of_all_jars_are_found_and_the_first_of_two_files_counts(tmp_path: Path) -> None:
    first = jar(tmp_path / "1.jar", {"a/A.class": "first", f"{SERVICES}a.Store": "# one\na.One", "META-INF/A.RSA": "x"})
    second = jar(tmp_path / "2.jar", {"a/A.class": "second", f"{SERVICES}a.Store": "a.Two\na.One\n", "b/": ""})
    merge([first, second], tmp_path / "merged.jar")
    with zipfile.ZipFile(tmp_path / "merged.jar") as merged:
        assert merged.testzip() is None
        assert merged.namelist() == ["META-INF/MANIFEST.MF", "a/A.class", f"{SERVICES}a.Store"]
        assert merged.read("a/A.class") == b"first"
        assert merged.read(f"{SERVICES}a.Store") == b"a.One\na.Two\n"


def test_it_is_merged_once_and_again_where_it_is_damaged(
    repository: Product, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said: list[str] = []
    made = merged_jar(said.append, repository)
    whole = made.read_bytes()
    assert len(said) == 1 and "merging 2 jars" in said[0]
    assert merged_jar(said.append, repository) == made
    assert len(said) == 1
    made.write_bytes(whole[:-1])
    assert merged_jar(said.append, repository).read_bytes() == whole
    assert len(said) == 2
    assert sorted(path.suffix for path in made.parent.iterdir()) == [".jar", ".sha256"]


def test_without_room_for_the_merged_one_the_error_says_where(
    repository: Product, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").write_text("no directory")
    with pytest.raises(FlinkFailed, match=r"cannot be merged .*access rights of .*cache"):
        merged_jar(print, repository)


NOW_MS = 1_000_000_000
CHECKPOINT = Checkpoint(17, NOW_MS - 900, 150, 4_100_000, "file:/chk-17")
JOB = Job("ab" * 16, "stream", "RUNNING", NOW_MS - 300_000, 6, 6, 0, CHECKPOINT)
WELL = Overview("1.19.0", 1, 2, 1, (JOB,))


def shown(overview: Overview) -> str:
    state = {"wrong": command.problems(overview, NOW_MS), "url": "http://a:1", "job_manager": asdict(overview)}
    return command.as_text(state | {"listening": {"workers": True}, "resumable": {}}, NOW_MS)


@pytest.mark.parametrize(
    ("job", "slots", "says"),
    [
        (replace(JOB, state="RESTARTING"), 1, "stream is RESTARTING"),
        (replace(JOB, running=4), 1, "stream: 4 of 6 tasks run"),
        (replace(JOB, running=4), 0, "stream: 4 of 6 tasks run: it waits for a slot, and none is free"),
        (
            replace(JOB, checkpoint=replace(CHECKPOINT, at_ms=NOW_MS - 75_150), failed_checkpoints=3),
            1,
            "stream: no checkpoint for 75 s, 3 failed",
        ),
        (replace(JOB, checkpoint=None), 1, "stream: no checkpoint for 300 s, 0 failed"),
    ],
)
def test_what_is_wrong_with_a_job_is_said(job: Job, slots: int, says: str) -> None:
    overview = replace(WELL, jobs=(job,), free_slots=slots)
    assert command.problems(overview, NOW_MS) == [says]
    assert shown(overview).splitlines()[0].split(maxsplit=2) == ["state", "WRONG", says]


@pytest.mark.parametrize(
    "job",
    [JOB, replace(JOB, state="CANCELED", running=0, checkpoint=None), replace(JOB, since_ms=NOW_MS, checkpoint=None)],
)
def test_a_job_that_is_well_or_over_or_new_is_no_trouble(job: Job) -> None:
    assert command.problems(replace(WELL, jobs=(job,)), NOW_MS) == []


def test_status_shows_slots_jobs_checkpoints_and_restarts() -> None:
    text = shown(WELL)
    for said in (
        "Flink 1.19.0",
        "1 of 2 slots free",
        "6 of 6 tasks run, restarts 0",
        "checkpoint 17, 0.9 s ago: 4.1 MB in 150 ms",
    ):
        assert said in text


def test_only_the_newest_jobs_that_are_over_are_shown() -> None:
    over = tuple(replace(JOB, id=f"{number:032}", state="CANCELED") for number in range(9))
    text = shown(replace(WELL, jobs=(JOB, *over)))
    assert text.count("canceled") == command.SHOWN_ENDED
    assert JOB.id in text and over[0].id in text and over[8].id not in text


def test_the_newest_checkpoint_of_a_job_that_does_not_run_can_be_resumed_from(tmp_path: Path) -> None:
    for age_s, place in enumerate(
        ("checkpoints/new/chk-9", "checkpoints/old/chk-8", "checkpoints/old/chk-7", "savepoints/savepoint-a")
    ):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "_metadata").touch()
        os.utime(tmp_path / place / "_metadata", (1000 - age_s, 1000 - age_s))
    # One that was never finished has no metadata.
    (tmp_path / "checkpoints" / "old" / "chk-10").mkdir()
    found = command.resumable(tmp_path, {"new"})
    assert found == {
        kind: (tmp_path / place).as_uri()
        for kind, place in (("checkpoint", "checkpoints/old/chk-8"), ("savepoint", "savepoints/savepoint-a"))
    }
    assert command.resumable(tmp_path, set())["checkpoint"].endswith("new/chk-9")
    assert command.resumable(tmp_path / "nowhere", set()) == {}


def test_where_nothing_runs_it_says_so(tmp_path: Path) -> None:
    ports = free_ports(("rest_port",))
    settings = Settings(paths=Paths(state=str(tmp_path)), flink=FlinkSettings(**ports))
    state = command.read_state(settings, f"http://127.0.0.1:{ports['rest_port']}", NOW_MS)
    assert command.is_wrong(state)
    assert state["listening"] == {"job server": False, "workers": False}
    (wrong,) = state["wrong"]
    assert wrong.endswith("start one with `springtide flink up`, or correct flink.rest_port")
    assert "job manager     unreachable" in command.as_text(state, NOW_MS)
