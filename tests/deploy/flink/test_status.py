"""What status says of a cluster: what is wrong, and what a job can be resumed from."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from deploy.flink import command
from state.config.sections import FlinkSettings, Paths
from state.config.settings import Settings
from state.flink import Checkpoint, Job, Overview
from state.process.ports import free_ports

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
