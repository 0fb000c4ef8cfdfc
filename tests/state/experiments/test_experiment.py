"""The document of experiments: pure transitions, one writer at a time, damage refused, and crashes that leave nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from state.config.loading import load
from state.config.settings import Settings
from state.errors import ControlConflict, RegistryError, SettingsError
from state.experiments.evidence import Exposure, decode_exposure
from state.experiments.experiment import GATE, By, Change, Experiment, Experiments, Schedule

GOLDEN = Path(__file__).parents[2] / "golden"
ANN = By("ann", "try it", 1_000)


def by(now_ms: int = 2_000, actor: str = GATE) -> By:
    return By(actor, "so it is", now_ms)


def shadow(name: str = "wider") -> Experiment:
    return Experiment(name, "shadow", "nothing", None, 1, {}, (Change(500, "shadow", None, 0.0, "ann", "see"),))


def waiting(name: str = "wider", steps: tuple[float, ...] = (1.0, 50.0)) -> Experiment:
    return shadow(name).start_rollout(steps, 60.0, 7, 9, ANN)


def running(name: str = "wider") -> Experiment:
    return waiting(name).begin(ANN)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load([f"--paths.state={tmp_path}"], {}, "/dev/null")


@pytest.fixture
def experiments(settings: Settings) -> Experiments:
    return Experiments(settings)


def test_a_rollout_goes_through_its_steps_and_is_done() -> None:
    first = running()
    second = first.next_step(by())
    done = second.next_step(by(3_000))
    seen = [(one.share, one.phase, one.rollout.since_ms) for one in (first, second, done) if one.rollout is not None]
    assert seen == [(0.01, "running", 1_000), (0.5, "running", 2_000), (0.5, "done", 2_000)]
    assert [change.share for change in done.rollout_history] == [0.0, 0.01, 0.5, 0.5]
    assert done.back(by(4_000)).share == done.stop(by(4_000)).share == 0.0


def test_no_user_is_in_the_trial_arm_until_it_answers() -> None:
    first = waiting()
    assert (first.phase, first.share, first.is_split, first.is_hosted) == ("starting", 0.0, False, True)
    begun = first.begin(by())
    assert (begun.share, begun.begin(by(3_000))) == (0.01, begun)
    assert not first.back(by()).is_hosted and not first.stop(by()).is_hosted


def test_a_stop_by_the_gate_is_reported_until_somebody_decides() -> None:
    stopped = running().back(by())
    assert stopped.is_stopped_by_gate and stopped.stage == "shadow"
    for decided in (stopped.back(by(3_000, "ann")), stopped.stop(by(3_000, "ann")), stopped.promote(by(3_000, "ann"))):
        assert not decided.is_stopped_by_gate
    halted = running().halt(by())
    assert halted.is_stopped_by_gate and not halted.resume(by(3_000, "ann")).is_stopped_by_gate
    assert not running().back(by(2_000, "ann")).is_stopped_by_gate


def test_a_halted_rollout_keeps_its_share_and_its_step_begins_again() -> None:
    halted = running().halt(by())
    assert (halted.share, halted.phase) == (0.01, "halted")
    with pytest.raises(ControlConflict, match="halted and cannot continue"):
        halted.next_step(by())
    resumed = halted.resume(by(9_000)).rollout
    assert resumed is not None and (resumed.phase, resumed.since_ms, resumed.step) == ("running", 9_000, 0)


def test_after_going_back_another_rollout_may_start_and_has_a_history_of_its_own() -> None:
    gone = running().back(by())
    for verb in (Experiment.next_step, Experiment.halt, Experiment.resume):
        with pytest.raises(ControlConflict, match="its rollout is back"):
            verb(gone, by())
    again = gone.start_rollout((5.0,), 1.0, 8, 9, by(5_000, "bob"))
    assert [change.phase for change in again.rollout_history] == ["starting"] and len(again.history) == 5


@pytest.mark.parametrize("verb", [Experiment.halt, Experiment.resume, Experiment.back, Experiment.stop])
def test_a_command_given_twice_changes_nothing(verb: Callable[[Experiment, By], Experiment]) -> None:
    once = verb(running().halt(by(1_500, "ann")), by(2_000, "ann"))
    assert verb(once, by(3_000, "ann")) is once


def test_a_promotion_keeps_the_share_until_the_live_trainer_has_what_it_learned() -> None:
    done = running().next_step(by()).next_step(by())
    promoting = done.promote(by(4_000, "ann"))
    assert not promoting.runs and promoting.share == 0.5
    assert promoting.cancel_promotion(by(4_500, "ann")).stage == "rollout"
    promoted = promoting.promoted(3, by(5_000, "ann"))
    assert (promoted.share, promoted.promoted_epoch, promoted.end(by(6_000)) is promoted) == (0.5, 3, True)
    over = promoted.taken_over(by(6_000))
    assert (over.share, over.phase, over.staged.at_ms) == (0.0, "over", 5_000)
    with pytest.raises(ControlConflict, match="springtide rollback"):
        promoted.stop(by(7_000))
    with pytest.raises(ControlConflict, match="is stopped and cannot be promoted"):
        shadow().stop(by()).promote(by(3_000))


@pytest.mark.parametrize("steps", [(), (0.0, 5.0), (5.0, 1.0), (5.0, 5.0), (50.0, 101.0)])
def test_steps_ascend_from_above_nobody_to_everybody(steps: tuple[float, ...]) -> None:
    with pytest.raises(SettingsError, match="are no steps"):
        waiting(steps=steps)


def test_one_rollout_is_open_and_four_experiments_run_at_a_time(experiments: Experiments) -> None:
    for name in ("wider", "deeper", "longer", "slower"):
        experiments.add(shadow(name), lambda folder: None)
    with pytest.raises(RegistryError, match="4 experiments run already"):
        experiments.add(shadow("other"), lambda folder: None)
    experiments.change("wider", lambda now: now.start_rollout((1.0,), 60.0, 7, 9, ANN))
    with pytest.raises(ControlConflict, match="rollout of wider is starting") as refused:
        experiments.change("deeper", lambda now: now.start_rollout((1.0,), 60.0, 7, 9, ANN))
    assert "springtide experiment back wider" in refused.value.do
    with pytest.raises(RegistryError, match="there is no experiment nobody"):
        experiments.get("nobody")
    rolled_out = experiments.document().rolled_out
    assert rolled_out is not None and rolled_out.name == "wider"


def test_changes_of_several_writers_are_all_kept_and_seen_by_all(settings: Settings, experiments: Experiments) -> None:
    experiments.edit(lambda now: now.with_experiment(running()))
    assert experiments.document().schedule is None

    def halt_and_resume() -> None:
        own = Experiments(settings)
        for _ in range(10):
            own.change("wider", lambda now: now.halt(by(1, "ann")))
            own.change("wider", lambda now: now.resume(by(2, "ann")) if now.phase == "halted" else now)

    writers = [threading.Thread(target=halt_and_resume) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    kept = experiments.get("wider")
    assert [change.phase for change in kept.history[3:]] == ["halted", "running"] * ((len(kept.history) - 3) // 2)
    assert Experiments(settings).get("wider") == kept and len(kept.history) > 20


def test_a_decision_is_made_from_the_newest_state(settings: Settings, experiments: Experiments) -> None:
    """The gate continues while an operator halts: the transition sees the halt and refuses."""
    experiments.edit(lambda now: now.with_experiment(running()))
    Experiments(settings).change("wider", lambda now: now.halt(by(2_000, "ann")))
    with pytest.raises(ControlConflict, match="halted and cannot continue"):
        experiments.change("wider", lambda now: now.next_step(by()))


KILLED = """
import os, sys
from pathlib import Path
from state.config.loading import load
from state.experiments import experiment
from state.experiments.experiment import Change, Experiment, Experiments
settings = load([f"--paths.state={sys.argv[1]}"], {}, "/dev/null")
module, name = {"fill": (None, ""), "rename": (Path, "rename"), "document": (experiment.documents, "encode_sealed")}[sys.argv[2]]
def die(*_):
    os._exit(9)
if module is not None:
    setattr(module, name, die)
first = Experiment("wider", "shadow", "nothing", None, 1, {}, (Change(500, "shadow", None, 0.0, "ann", "see"),))
Experiments(settings).add(first, die if module is None else lambda folder: None)
"""


@pytest.mark.parametrize("point", ["fill", "rename", "document"])
def test_a_killed_start_leaves_no_experiment_and_its_directory_is_removed(
    settings: Settings, experiments: Experiments, point: str
) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(settings.state_dir), point], check=False, timeout=60)
    assert killed.returncode == 9 and experiments.document().experiments == ()
    experiments.sweep()
    assert experiments.open() == [] and not list(experiments.path.glob(".*~*"))
    experiments.add(shadow(), lambda folder: None)
    with pytest.raises(RegistryError, match="there was an experiment wider before"):
        experiments.add(shadow(), lambda folder: None)
    experiments.sweep()
    assert experiments.open() == ["wider"]
    experiments.drop_registry("wider")
    assert experiments.open() == [] and experiments.get("wider").runs


def test_a_damaged_document_is_refused_with_its_path(settings: Settings, experiments: Experiments) -> None:
    experiments.edit(lambda now: now.with_experiment(running()))
    path = settings.registry_dir / "experiments" / "experiments.json"
    path.write_bytes(path.read_bytes().replace(b"wider", b"wiper"))
    with pytest.raises(RegistryError, match="digest") as refused:
        Experiments(settings).document()
    assert str(path) in refused.value.what


def test_a_retrain_is_due_one_interval_after_the_last_and_never_while_one_runs() -> None:
    schedule = Schedule(0).begin(1_000)
    assert not schedule.is_due(500, 9_000)
    assert [schedule.end("dropped", "worse", 1_200).is_due(500, now_ms) for now_ms in (1_499, 1_500)] == [False, True]


def test_the_exposure_of_an_earlier_release_is_read_and_further_fields_are_ignored() -> None:
    written = (GOLDEN / "exposure.json").read_bytes()
    wanted = Exposure("00000000000000ff", "wider", 0, 0.01, "trial", 1_000, 2_500, True)
    assert decode_exposure(written) == wanted
    assert decode_exposure(json.dumps({**json.loads(written), "colour": "red"}).encode()) == wanted
    assert decode_exposure(b"{}") is None
