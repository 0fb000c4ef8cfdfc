"""A scheduled retrain on the running loop: from clicks of the topic, its trainer and its judge killed on the way, judged and dropped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from state.experiments.experiment import Experiments, Schedule
from state.experiments.past import read_past
from state.process.wall_clock import wall_ms
from state.registry.registry import Registry
from tests.e2e.loop.test_trial import SCORED_S, listed, trainer_of
from tests.e2e.running import ROOT, Loop, until

# In the middle of the others' tests none is due by itself: this process has a schedule of its own.
EVERY_S = 1
SCHEDULE = ("--retrain.every", f"{EVERY_S}s", "--retrain.days", "1", "--retrain.rows", "100")


@pytest.fixture
def judges(loop: Loop) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes of the schedule, which end with the test."""
    begun: list[subprocess.Popen[bytes]] = []
    yield begun
    for one in begun:
        if one.poll() is None:
            one.kill()
        one.communicate()


def begin(loop: Loop) -> subprocess.Popen[bytes]:
    """The process, as `up` starts it where `retrain.every` is set."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SPRINGTIDE_")}
    command = [sys.executable, "-m", "deploy.experiments.retrain", *loop.flags, *SCHEDULE]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)


def child_of(trainer: psutil.Process | None) -> psutil.Process | None:
    """The process that makes past clicks into rows."""
    for one in [] if trainer is None else trainer.children():
        try:
            if "streaming.past" in one.cmdline():
                return one
        except psutil.Error:
            continue
    return None


def known(loop: Loop) -> Schedule:
    return Experiments(loop.settings).document().schedule or Schedule(0)


@pytest.mark.nightly
def test_a_retrain_learns_the_topic_and_is_judged_through_kills(
    loop: Loop, judges: list[subprocess.Popen[bytes]]
) -> None:
    loop.springtide("follow", "--reason", "a test begins")
    experiments = Experiments(loop.settings)
    # 1. The first look finds nothing due. Then it begins, and its judge is killed at once: nothing waits for it but the judgement.
    judges.append(begin(loop))
    assert judges[0].wait(SCORED_S) == 0 and not known(loop).name
    until(lambda: known(loop).is_due(EVERY_S * 1000, wall_ms()), "none is due")
    judges.append(begin(loop))
    name = until(lambda: known(loop).name, lambda: f"none begins\n{loop.logs()}")
    until(lambda: experiments.document().find(name) is not None, "it has no experiment")
    judges[1].kill()
    # 2. Its trainer is killed while it learns past clicks: it learns them again, from nothing, and its child is gone.
    trainer = until(lambda: trainer_of(loop, name), "no trainer")
    child = until(lambda: child_of(trainer_of(loop, name)), lambda: f"no past clicks are made\n{loop.logs()}", SCORED_S)
    own = Registry(experiments.registry(name))
    assert own.versions() == []
    os.kill(trainer.pid, signal.SIGKILL)
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "its child stays")
    # 3. The past is a version: all clicks up to the cut, where the log goes on.
    first = until(lambda: own.versions()[:1], lambda: f"nothing is learned\n{loop.logs()}", SCORED_S)[0]
    past, made = read_past(own.path), own.manifest(first)
    assert past is not None
    assert (made.marks, made.log.next) == (past.marks, past.log.next) and made.rows > 0
    assert list(own.path.glob("past-*")) == []
    # 4. It is judged by rows that both scored, and dropped: it knows no more than the live one.
    judges.append(begin(loop))
    over = until(lambda: known(loop) if known(loop).outcome else None, lambda: f"{listed(loop, name)}", SCORED_S)
    compared: dict[str, Any] = listed(loop, name)["compared"]
    assert compared["rows"] > 0 and over.name == name
    assert over.outcome == {"better": "promoted"}.get(compared["verdict"], "dropped"), over
    until(lambda: name not in experiments.open(), "what it learned is not removed")
    assert listed(loop, name)["stage"] == {"promoted": "promoted"}.get(over.outcome, "stopped")
    assert loop.springtide("status")["retrain"]["reason"] == over.reason
