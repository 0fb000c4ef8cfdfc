"""The process that runs experiments' trainers: desired state is reached, at low priority, and it ends when none is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from deploy.experiments.processes import plans
from deploy.watch import scrape
from state.config.loading import load
from state.config.settings import Settings
from state.experiments.comparison import is_wanted
from state.experiments.experiment import Experiments
from state.features.mask import Mask
from state.features.spec import FeatureSpec
from state.process.ports import free_port
from state.registry.control import roll_back, start, train
from state.registry.registry import Registry
from tests.deploy.operating import Operator
from tests.e2e.running import until

DEADLINE_S = 180.0


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
        command = [sys.executable, "-m", "deploy.experiments.shadow"]
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


def test_the_desired_state_of_experiments_is_reached_and_then_the_process_ends(
    settings: Settings, process: Callable[[], psutil.Popen]
) -> None:
    operator, trials, live = Operator(settings.state_dir), Experiments(settings), Registry(settings.registry_dir)
    wanted = plans(settings)[0].wanted
    assert wanted is not None and not wanted()
    for name in ("kept", "left"):
        made = json.loads(
            operator("experiment", "start", name, "--from", "nothing", "--reason", "to see", "-o", "json")
        )
        assert (made["stage"], made["version"]) == ("shadow", None)
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
    operator("experiment", "stop", "left", "--reason", "enough")
    until(lambda: trials.open() == ["kept"] and len(trainers(running)) == 1, "it is not stopped")
    assert running.poll() is None and is_wanted(live.path)

    # A killed trainer is started again.
    (killed,) = trainers(running)
    killed.kill()
    until(lambda: [one.pid for one in trainers(running)] not in ([], [killed.pid]), "it is not started again")

    # The live trainer goes back: what the trial learned is nothing to compare with, and nothing is left to do.
    live.change(lambda now: roll_back(now, 40, Mask.NONE, actor="ann", reason="poison", now_ms=11))
    assert running.wait(DEADLINE_S) == 0
    ended = trials.get("kept")
    assert (ended.stage, ended.newest.actor) == ("ended", "experiments")
    assert "rollback by ann, poison" in ended.newest.reason
    assert trials.open() == [] and not wanted() and not is_wanted(live.path)
    assert "ended" in operator("experiment", "status")


@pytest.mark.nightly
def test_without_up_an_experiment_runs_while_it_is_wanted_and_the_next_one_is_waited_for(settings: Settings) -> None:
    operator, experiments, port = Operator(settings.state_dir), Experiments(settings), free_port()
    environment = {name: text for name, text in os.environ.items() if not name.startswith("SPRINGTIDE_")}
    environment |= settings.environment() | {"SPRINGTIDE_UP_METRICS_PORT": str(port - 5)}
    pod = psutil.Popen([sys.executable, "-m", "deploy.experiments.processes"], env=environment)

    def trainers_below() -> int:
        found = 0
        for one in pod.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                found += "trainer.loop" in one.cmdline()
        return found

    try:
        operator("experiment", "start", "tried", "--from", "nothing", "--reason", "to see")
        until(lambda: trainers_below() == 1, "its trainer does not run")
        operator("experiment", "stop", "tried", "--reason", "enough")
        until(lambda: not experiments.open() and not pod.children(recursive=True), "it is not removed")
        found = scrape.scrape({"pod": f"http://127.0.0.1:{port}/metrics"})["pod"]
        assert found.value("springtide_up_starts_total", part="experiments") == 1.0
        assert found.value("springtide_up_deaths_in_a_row", part="experiments") == 0.0
        pod.send_signal(signal.SIGTERM)
        assert pod.wait(60) == 0
    finally:
        if pod.poll() is None:
            pod.kill()
            pod.wait()
