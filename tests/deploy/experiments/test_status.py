"""What status and /metrics report: a rollout that nobody judges, a trainer that does not learn, and damaged documents."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from deploy.experiments import status
from deploy.experiments.processes import EXPERIMENTS, ROLLOUT_HOST, plans, remove
from deploy.watch.scrape import Scrape, parsed
from state import layout
from state.config.loading import load
from state.config.sections import Paths
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.disk.memory_place import home, own
from state.experiments import comparison
from state.experiments.comparison import PairedComparison
from state.experiments.evidence import Evidence
from state.experiments.experiment import GATE, By, Change, Experiment, Experiments
from state.experiments.gate import report
from state.process.wall_clock import wall_ms
from state.registry import control
from state.registry.control import train
from state.registry.registry import Registry

AGO_MS = 90_000


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
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


def test_a_running_rollout_is_unwatched_unless_it_was_judged_lately(settings: Settings) -> None:
    at_ms = wall_ms() - AGO_MS
    experiments, _ = begun(settings, at_ms)
    found, metrics = seen(settings)
    assert status.as_text(found)[0] == "UNWATCHED"
    assert found["rollout"]["unwatched_s"] == pytest.approx(AGO_MS / 1000, abs=5.0)
    assert metrics.value("springtide_rollout_judged_timestamp_seconds", trial="wider") == at_ms / 1000
    evidence = Evidence("wider")
    for ago_ms, word in ((0, "running"), (AGO_MS - 1_000, "UNWATCHED")):
        judged_ms = wall_ms() - ago_ms
        experiments.write_report(report(experiments.get("wider"), evidence, judged_ms))
        with DirectoryLock(experiments.registry("wider"), layout.TRAINER_LOCK):
            found, metrics = seen(settings)
        assert status.as_text(found)[0] == word and found["rollout"]["compared"]["finding"] == "too early"
        assert metrics.value("springtide_rollout_judged_timestamp_seconds", trial="wider") == judged_ms / 1000


def test_a_halted_rollout_needs_no_driver_and_is_reported_as_stopped_by_the_gate(settings: Settings) -> None:
    experiments, by = begun(settings, wall_ms() - AGO_MS)
    experiments.change("wider", lambda now: now.halt(by))
    found, metrics = seen(settings)
    assert (status.as_text(found)[0], found["rollout"]["unwatched_s"]) == ("HALTED", None)
    assert metrics.value("springtide_rollout_stopped", trial="wider") == 1.0
    assert metrics.value("springtide_rollout_judged_timestamp_seconds", trial="wider") is None
    experiments.change("wider", lambda now: now.back(by))
    assert status.as_text(seen(settings)[0])[0] == "BACK"
    experiments.change("wider", lambda now: now.back(By("ann", "seen", 5)))
    found, metrics = seen(settings)
    assert found["rollout"] is None and metrics.value("springtide_rollout_stopped", trial="wider") is None


def test_a_trainer_that_is_paused_or_does_not_run_is_reported(settings: Settings) -> None:
    experiments = shadow(settings)
    own_registry = Registry(experiments.registry("wider"))

    def word() -> str:
        return status.as_text(seen(settings)[0])[0]

    assert word() == "no trainer"
    with DirectoryLock(own_registry.path, layout.TRAINER_LOCK):
        assert word() == "waits"
        own_registry.change(lambda now: train(now, False, actor="ann", reason="look", now_ms=9))
        assert word() == "paused"
    own_registry.change(lambda now: train(now, True, actor="ann", reason="fine", now_ms=10))
    content = json.loads((own_registry.path / layout.TRAINER_LOCK).read_text())
    (own_registry.path / layout.TRAINER_LOCK).write_text(json.dumps(content | {"started_s": 0.0}))
    assert word() == "no trainer"


@pytest.mark.parametrize("damaged", ["document", "comparison"])
def test_a_damaged_document_is_reported_and_nothing_is_removed(settings: Settings, damaged: str) -> None:
    experiments = shadow(settings)
    comparison.write(experiments.folder("wider"), PairedComparison(0.05, 10_000))
    document = experiments.shared / "experiments.json"
    path = document if damaged == "document" else experiments.folder("wider") / comparison.COMPARISON
    path.write_bytes(path.read_bytes().replace(b"0", b"1"))
    found, _ = seen(settings)
    word, text = status.as_text(found)
    assert word == "DAMAGED" and str(path) in text and "remove it" in text
    if damaged == "document":
        retrain = status.retrain_status(settings, 0)
        assert retrain is not None and status.retrain_as_text(retrain)[0] == "unknown"
        (plan,) = plans(settings)
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
