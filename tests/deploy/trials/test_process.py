"""The process that runs trials: what is wanted of them comes true, bounded and behind everybody else, and it ends when nothing is left."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from deploy.trials.process_plan import plans
from state.config.loading import load
from state.config.settings import Settings
from state.features.mask import Mask
from state.features.spec import FeatureSpec
from state.registry.control import roll_back, start, train
from state.registry.registry import Registry
from state.trials.row_losses import is_wanted
from state.trials.trial import Trials
from tests.deploy.operating import Operator

DEADLINE_S = 180.0


def until(condition: Callable[[], bool], what: str) -> None:
    """Polls until `condition`, or fails."""
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.02)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A registry whose clicks were analysed; nobody answers for Kafka, so that trainers wait."""
    found = load(["--paths.state", str(tmp_path / "state"), "--kafka.port", "1"], {}, "/dev/null")
    registry = Registry(found.registry_dir)
    registry.propose(start(actor="trainer", reason="first start", now_ms=0))
    digest = FeatureSpec.from_settings(found).digest
    registry.specs.add_spec(digest, {"preprocessing": found.model.preprocessing}, lambda folder: None)
    return found


@pytest.fixture
def process(settings: Settings) -> Iterator[Callable[[], psutil.Popen]]:
    """Starts the process; ends it with the test."""
    begun: list[psutil.Popen] = []

    def begin() -> psutil.Popen:
        environment = {name: text for name, text in os.environ.items() if not name.startswith("SPRINGTIDE_")}
        command = [sys.executable, "-m", "deploy.trials.process"]
        begun.append(psutil.Popen(command, env=environment | settings.environment(), stderr=subprocess.PIPE))
        return begun[-1]

    yield begin
    for one in begun:
        if one.poll() is None:
            one.kill()
        one.communicate()


def trainers(of: psutil.Popen) -> list[psutil.Process]:
    found = []
    for one in of.children():
        # One that was killed may not have been noticed yet.
        with contextlib.suppress(psutil.Error):
            found += [one] if "trainer.loop" in one.cmdline() else []
    return found


def test_what_is_wanted_of_trials_comes_true_and_then_the_process_ends(
    settings: Settings, process: Callable[[], psutil.Popen]
) -> None:
    operator, trials, live = Operator(settings.state_dir), Trials(settings.state_dir), Registry(settings.registry_dir)
    wanted = plans(settings)[0].wanted
    assert wanted is not None and not wanted()
    for name in ("kept", "left"):
        made = json.loads(operator("trial", "start", name, "--from", "nothing", "--reason", "to see", "-o", "json"))
        assert (made["wanted"], made["version"]) == ("running", None)
    assert wanted() and not is_wanted(live.path)
    running = process()
    until(lambda: len(trainers(running)) == 2, "the trainers do not run")
    for one in trainers(running):
        assert one.nice() > 0 and len(one.cpu_affinity()) == settings.trials.cores
    assert is_wanted(live.path) and is_wanted(trials.registry("kept"))

    # An operator pauses training: it is paused in trials too.
    live.change(lambda now: train(now, False, actor="ann", reason="look", now_ms=9))

    def is_paused() -> bool:
        control = Registry(trials.registry("kept")).control()
        return control is not None and not control.training and control.actor == "ann"

    until(is_paused, "the trial goes on")

    # One that is stopped goes, with all that it learned; the other one stays.
    operator("trial", "stop", "left", "--reason", "enough")
    until(lambda: trials.open() == ["kept"] and len(trainers(running)) == 1, "it is not stopped")
    assert running.poll() is None and is_wanted(live.path)

    # A killed trainer is started again.
    (killed,) = trainers(running)
    killed.kill()
    until(lambda: [one.pid for one in trainers(running)] not in ([], [killed.pid]), "it is not started again")

    # The live trainer goes back: what the trial learned is nothing to compare with, and nothing is left to do.
    live.change(lambda now: roll_back(now, 40, Mask.NONE, actor="ann", reason="poison", now_ms=11))
    assert running.wait(DEADLINE_S) == 0
    ended = trials.read("kept")
    assert (ended.wanted, ended.actor) == ("ended", "trials") and "rollback by ann, poison" in ended.reason
    assert trials.open() == [] and not wanted() and not is_wanted(live.path)
    assert "ended" in operator("trial", "list")
