"""Processes of experiments: which of them run, and what status reports of each."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from deploy.experiments import status
from deploy.experiments.processes import EXPERIMENTS, ROLLOUT_HOST, plans, remove
from deploy.watch import scrape
from deploy.watch.scrape import Scrape, parsed
from state import layout
from state.config.loading import load
from state.config.sections import Paths
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.disk.memory_place import home, own
from state.experiments import comparison
from state.experiments.comparison import PairedComparison, is_wanted
from state.experiments.evidence import Evidence
from state.experiments.experiment import GATE, By, Change, Experiment, Experiments
from state.experiments.gate import report
from state.features.mask import Mask
from state.features.spec import FeatureSpec
from state.process.environment import wall_ms
from state.process.network import free_port
from state.registry import control
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


AGO_MS = 90_000


@pytest.fixture
def quiet_settings(tmp_path: Path) -> Settings:
    return replace(Settings(), paths=Paths(state=str(tmp_path)))


def shadow(settings: Settings, name: str = "wider") -> Experiments:
    """An experiment whose trainer has a registry."""
    experiments = Experiments(settings)
    change = Change(1_000, "shadow", None, 0.0, "ann", "to see")

    def fill(folder: Path) -> None:
        Registry(folder).propose(control.start(actor="ann", reason="to see", now_ms=1))

    experiments.add(Experiment(name, "shadow", "nothing", None, 1, {}, (change,)), fill)
    return experiments


def begun(settings: Settings, at_ms: int) -> tuple[Experiments, By]:
    """A rollout at 5 % of the users, and who decided so."""
    experiments, by = shadow(settings), By(GATE, "it answers", at_ms)
    experiments.change("wider", lambda now: now.start_rollout((5.0, 100.0), 60.0, 0, 0, by))
    experiments.change("wider", lambda now: now.begin(by))
    return experiments, by


def seen(settings: Settings) -> tuple[dict[str, Any], Scrape]:
    """The experiment in `springtide status`, and /metrics."""
    registry = CollectorRegistry()
    registry.register(status.ExperimentCollector(settings))
    (found,) = status.reported(settings)
    return found, Scrape(parsed(generate_latest(registry).decode()))


def test_a_running_rollout_is_unwatched_unless_it_was_judged_lately(quiet_settings: Settings) -> None:
    at_ms = wall_ms() - AGO_MS
    experiments, _ = begun(quiet_settings, at_ms)
    found, metrics = seen(quiet_settings)
    assert status.as_text(found)[0] == "UNWATCHED"
    assert found["rollout"]["unwatched_s"] == pytest.approx(AGO_MS / 1000, abs=5.0)
    assert metrics.value("springtide_rollout_judged_timestamp_seconds", trial="wider") == at_ms / 1000
    evidence = Evidence("wider")
    for ago_ms, word in ((0, "running"), (AGO_MS - 1_000, "UNWATCHED")):
        judged_ms = wall_ms() - ago_ms
        experiments.write_report(report(experiments.get("wider"), evidence, judged_ms))
        with DirectoryLock(experiments.registry("wider"), layout.TRAINER_LOCK):
            found, metrics = seen(quiet_settings)
        assert status.as_text(found)[0] == word and found["rollout"]["compared"]["finding"] == "too early"
        assert metrics.value("springtide_rollout_judged_timestamp_seconds", trial="wider") == judged_ms / 1000


def test_a_halted_rollout_needs_no_driver_and_is_reported_as_stopped_by_the_gate(quiet_settings: Settings) -> None:
    experiments, by = begun(quiet_settings, wall_ms() - AGO_MS)
    experiments.change("wider", lambda now: now.halt(by))
    found, metrics = seen(quiet_settings)
    assert (status.as_text(found)[0], found["rollout"]["unwatched_s"]) == ("HALTED", None)
    assert metrics.value("springtide_rollout_stopped", trial="wider") == 1.0
    assert metrics.value("springtide_rollout_judged_timestamp_seconds", trial="wider") is None
    experiments.change("wider", lambda now: now.back(by))
    assert status.as_text(seen(quiet_settings)[0])[0] == "BACK"
    experiments.change("wider", lambda now: now.back(By("ann", "seen", 5)))
    found, metrics = seen(quiet_settings)
    assert found["rollout"] is None and metrics.value("springtide_rollout_stopped", trial="wider") is None


def test_a_trainer_that_is_paused_or_does_not_run_is_reported(quiet_settings: Settings) -> None:
    experiments = shadow(quiet_settings)
    own_registry = Registry(experiments.registry("wider"))

    def word() -> str:
        return status.as_text(seen(quiet_settings)[0])[0]

    assert word() == "no trainer"
    with DirectoryLock(own_registry.path, layout.TRAINER_LOCK):
        assert word() == "waits"
        own_registry.change(lambda now: train(now, False, actor="ann", reason="look", now_ms=9))
        assert word() == "paused"
    own_registry.change(lambda now: train(now, True, actor="ann", reason="fine", now_ms=10))
    content = json.loads((own_registry.path / layout.TRAINER_LOCK).read_text())
    (own_registry.path / layout.TRAINER_LOCK).write_text(
        json.dumps(content | {"owner": f"{content['host']}@{content['pid']}@0"})
    )
    assert word() == "no trainer"


@pytest.mark.parametrize("damaged", ["document", "comparison"])
def test_a_damaged_document_is_reported_and_nothing_is_removed(quiet_settings: Settings, damaged: str) -> None:
    experiments = shadow(quiet_settings)
    comparison.write(experiments.folder("wider"), PairedComparison(0.05, 10_000))
    document = experiments.shared / "experiments.json"
    path = document if damaged == "document" else experiments.folder("wider") / comparison.COMPARISON
    path.write_bytes(path.read_bytes().replace(b"0", b"1"))
    found, _ = seen(quiet_settings)
    word, text = status.as_text(found)
    assert word == "DAMAGED" and str(path) in text and "remove it" in text
    if damaged == "document":
        retrain = status.retrain_status(quiet_settings, 0)
        assert retrain is not None and status.retrain_as_text(retrain)[0] == "unknown"
        (plan,) = plans(quiet_settings)
        assert plan.wanted is not None and plan.wanted() and experiments.open() == ["wider"]


def test_a_host_is_wanted_while_a_rollout_of_an_experiment_of_this_machine_is_open(tmp_path: Path) -> None:
    for address in ("http://trial-host:8501", "https://127.0.0.1:8601", ""):
        elsewhere = load([f"--paths.state={tmp_path}", f"--rollout.address={address}"], {}, "/dev/null")
        assert [plan.name for plan in plans(elsewhere)] == [EXPERIMENTS]
    settings = load([f"--paths.state={tmp_path}", "--rollout.address=http://127.0.0.1:8601"], {}, "/dev/null")
    plan = plans(settings)[-1]
    assert plan.name == ROLLOUT_HOST and plan.wanted is not None and not plan.wanted()
    experiments, by = begun(settings, 5)
    assert plan.wanted()
    experiments.change("wider", lambda now: now.halt(by))
    assert plan.wanted()
    experiments.change("wider", lambda now: now.back(by))
    assert not plan.wanted()
    experiments.change("wider", lambda now: now.start_rollout((5.0,), 60.0, 0, 0, by))
    assert plan.wanted()
    experiments.drop_registry("wider")
    assert not plan.wanted(), "its registry is elsewhere"


def test_the_state_of_a_host_is_removed_and_so_are_its_stores_in_memory(tmp_path: Path) -> None:
    folder, memory = tmp_path / "host", tmp_path / "memory"
    link = folder / layout.SERVING / layout.ROWS
    link.parent.mkdir(parents=True)
    memory.mkdir()
    store = own(home(memory, link))
    store.mkdir()
    link.symlink_to(store)
    remove(folder)
    assert not folder.exists() and list(memory.iterdir()) == []
    remove(folder)
