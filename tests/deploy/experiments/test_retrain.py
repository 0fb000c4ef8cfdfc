"""The scheduled retrain: begun when it is due, judged once, promoted or dropped with the reason, wherever it was killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from deploy.experiments import status
from deploy.experiments.processes import EXPERIMENTS, RETRAIN, plans
from deploy.experiments.retrain import Retrainer
from state.config.loading import load
from state.config.settings import Settings
from state.errors import SettingsError
from state.experiments import comparison
from state.experiments.comparison import PairedComparison, RowLosses
from state.experiments.experiment import By, Experiment, Experiments, Schedule
from state.experiments.past import read_past
from state.features.arrays import DAY_MS
from state.features.spec import FeatureSpec
from state.registry.control import HeldUpdate, hold, release, start
from state.registry.registry import Registry
from tests.deploy.operating import NOW_MS, Operator, draft, files
from tests.kills import killed_at

HOUR_MS = 3_600_000
FLAGS = ("--retrain.every", "4h", "--retrain.days", "2", "--retrain.rows", "1000")


class Shop:
    """A live registry with a version, and the process of the schedule, stepped by hand at a time that is told."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.settings: Settings = load(["--paths.state", str(folder), *FLAGS, *flags], {}, "/dev/null")
        self.live, self.experiments = Registry(self.settings.registry_dir), Experiments(self.settings)
        self.operator, self.now_ms = Operator(self.settings.state_dir), NOW_MS
        self.live.propose(start(actor="trainer", reason="first start", now_ms=0))
        self.spec = FeatureSpec.from_settings(self.settings).digest
        about = {"preprocessing": self.settings.model.preprocessing}
        self.live.specs.add_spec(self.spec, about, lambda folder: None)

    def learn(self) -> None:
        """The live trainer has a version."""
        self.live.publish(replace(draft(1, None), spec=self.spec), files())

    def step(self, after_ms: int = 0) -> bool:
        """Time passes, and the process looks; as after a start each time."""
        self.now_ms += after_ms
        return Retrainer(self.settings, lambda: self.now_ms).step()

    def begin(self) -> Experiment:
        self.learn()
        assert not self.step()
        assert self.step(4 * HOUR_MS)
        (found,) = self.all()
        return found

    def all(self) -> tuple[Experiment, ...]:
        return self.experiments.document().experiments

    def get(self, name: str) -> Experiment:
        return self.experiments.get(name)

    def roll_out(self, name: str, share: float) -> None:
        """An operator starts a rollout."""
        self.experiments.change(name, lambda now: now.start_rollout((share,), 60.0, 0, 0, By("ann", "to see", 1)))

    def compare(self, name: str, difference: float, rows: int = 4000) -> None:
        """Both trainers scored rows, whose losses differ by so much on average."""
        drawn, made = np.random.default_rng(3), PairedComparison(0.05, 10_000)
        live = drawn.random(rows) + 2.0
        own = live + difference + 0.1 * drawn.standard_normal(rows)
        blocks = drawn.integers(0, 512, rows).astype(np.uint16)
        made.add([RowLosses(7, blocks, live)], [RowLosses(7, blocks, own)])
        comparison.write(self.experiments.folder(name), made)

    def publish(self, name: str) -> int:
        """The trial's trainer has a version; returns it."""
        own = Registry(self.experiments.registry(name))
        return own.publish(replace(draft(1, None, epoch=2), spec=self.spec), files()).version

    @property
    def known(self) -> Schedule:
        found = self.experiments.document().schedule
        assert found is not None
        return found

    @property
    def is_wanted(self) -> bool:
        (plan,) = (one for one in plans(self.settings) if one.name == RETRAIN)
        assert plan.wanted is not None
        return plan.wanted()

    def told(self) -> tuple[str, str]:
        found = status.retrain_status(self.settings, self.now_ms)
        assert found is not None
        return status.retrain_as_text(found)

    def metrics(self) -> str:
        registry = CollectorRegistry()
        registry.register(status.ExperimentCollector(self.settings))
        return generate_latest(registry).decode()


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path / "state")


def test_one_begins_when_it_is_due_and_never_two_and_missed_times_are_not_made_up_for(shop: Shop) -> None:
    assert shop.is_wanted, "nobody looked at the schedule yet"
    trial = shop.begin()
    assert trial.name.startswith("retrain-") and (trial.origin, trial.version, trial.newest.actor) == (
        "clicks",
        None,
        "retrain",
    )
    past = read_past(shop.experiments.registry(trial.name))
    newest = shop.live.manifest(1)
    assert past is not None and (past.version, past.marks, past.log) == (1, newest.marks, newest.log)
    assert past.until_ms - past.begin_ms == 2 * DAY_MS and past.until_ms == newest.event_time_ms
    assert shop.told()[0] == "runs" and "springtide_retrain_under_way 1.0" in shop.metrics()
    # While it is under way no other begins, and too few rows decide nothing.
    shop.compare(trial.name, 0.0, 400)
    assert shop.step(HOUR_MS) and len(shop.all()) == 1 and shop.get(trial.name).runs
    shop.compare(trial.name, 0.5)
    assert not shop.step(9 * HOUR_MS)
    # Two were missed: one begins, and the next one four hours after it.
    begun_ms = shop.known.begun_at_ms
    assert shop.step() and shop.known.begun_at_ms == begun_ms + 10 * HOUR_MS
    assert shop.step(HOUR_MS)
    assert len(shop.all()) == 2


def test_one_that_is_better_is_promoted(shop: Shop) -> None:
    trial = shop.begin()
    version = shop.publish(trial.name)
    shop.compare(trial.name, -0.5)
    assert not shop.step(60_000)
    control, promoted = shop.live.control(), shop.get(trial.name)
    assert control is not None and control.plan is not None
    assert (control.epoch, control.actor, control.plan["experiment"]) == (2, "retrain", trial.name)
    assert control.plan["version"] == version and control.reason.startswith("better: -0.")
    assert (promoted.stage, promoted.promoted_epoch) == ("promoted", 2)
    assert (shop.known.outcome, shop.known.judged_at_ms) == ("promoted", shop.now_ms)
    word, text = shop.told()
    assert word == "PROMOTED" and "over 4,000 examples" in text and text.endswith("the next one begins in 3 h 59 min")
    assert 'springtide_retrain_outcome{outcome="promoted"} 1.0' in shop.metrics()


@pytest.mark.parametrize(
    ("difference", "rows", "after_ms", "outcome", "said"),
    [
        (0.5, 4000, 60_000, "dropped", "worse: +0."),
        (0.0, 4000, 60_000, "dropped", "no better: "),
        (0.0, 400, 25 * HOUR_MS, "dropped", "no better after 1 d 1 h: "),
        (None, 0, 25 * HOUR_MS, "failed", "no example could be compared after 1 d 1 h"),
    ],
)
def test_one_that_is_not_is_dropped_with_the_reason(
    shop: Shop, difference: float | None, rows: int, after_ms: int, outcome: str, said: str
) -> None:
    trial = shop.begin()
    if difference is not None:
        shop.compare(trial.name, difference, rows)
    assert not shop.step(after_ms)
    assert (shop.known.outcome, shop.get(trial.name).stage) == (outcome, "stopped")
    assert shop.known.reason.startswith(said) and shop.get(trial.name).newest.reason == shop.known.reason
    assert f'springtide_retrain_outcome{{outcome="{outcome}"}} 1.0' in shop.metrics()
    control = shop.live.control()
    assert control is not None and control.epoch == 1
    assert said in shop.operator("experiment", "status", *FLAGS)


def test_what_others_decide_of_its_trial_counts(shop: Shop) -> None:
    trial = shop.begin()
    shop.operator("experiment", "stop", trial.name, "--reason", "the machine is needed")
    assert not shop.step() and shop.known.outcome == "dropped"
    assert shop.known.reason.endswith(": the machine is needed") and shop.known.reason.startswith("by ")
    # The live trainer goes back: the process of trials ends those that learned what is taken back.
    assert shop.step(4 * HOUR_MS)
    name = shop.known.name
    by = By("experiments", "the live trainer continued in epoch 2", 9)
    shop.experiments.change(name, lambda now: now.end(by))
    assert not shop.step() and shop.known.reason == "it ended: the live trainer continued in epoch 2"


def test_a_rollout_of_it_is_waited_for_and_one_that_went_back_drops_it(shop: Shop) -> None:
    trial = shop.begin()
    shop.compare(trial.name, -0.5)
    shop.roll_out(trial.name, 5.0)
    assert shop.step(9 * HOUR_MS) and shop.get(trial.name).runs
    shop.experiments.change(trial.name, lambda now: now.back(By("gate", "it is slower", 2)))
    assert not shop.step()
    assert (shop.known.outcome, shop.known.reason) == ("dropped", "its rollout was rolled back: it is slower (gate)")


def test_where_a_rollout_is_asked_for_better_alone_is_not_enough(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "state", "--retrain.rollout", "on")
    trial = shop.begin()
    shop.publish(trial.name)
    shop.compare(trial.name, -0.5)
    assert shop.step(HOUR_MS) and shop.get(trial.name).runs
    shop.roll_out(trial.name, 100.0)
    assert shop.step(HOUR_MS)
    shop.experiments.change(trial.name, lambda now: now.begin(By("gate", "the trial answers", 2)))
    shop.experiments.change(trial.name, lambda now: now.next_step(By("gate", "no check failed", 3)))
    assert not shop.step() and shop.known.outcome == "promoted" and shop.known.reason.startswith("its rollout is done")
    # Nobody opened one of the next: it is too late then.
    assert shop.step(4 * HOUR_MS)
    shop.compare(shop.known.name, -0.5)
    assert not shop.step(25 * HOUR_MS)
    last = shop.known
    assert last.outcome == "dropped" and last.reason.startswith("better, but its rollout did not end")


def test_one_that_cannot_begin_failed_and_says_why(shop: Shop) -> None:
    assert not shop.step()
    assert not shop.step(4 * HOUR_MS)
    assert shop.known.outcome == "failed" and "no version that learned anything yet" in shop.known.reason
    assert shop.all() == () and 'outcome{outcome="failed"} 1.0' in shop.metrics()
    # The next one begins as if nothing had been.
    shop.learn()
    assert shop.step(4 * HOUR_MS)


def test_what_the_guard_holds_comes_before_a_promotion(shop: Shop) -> None:
    trial = shop.begin()
    shop.publish(trial.name)
    shop.compare(trial.name, -0.5)
    held = HeldUpdate("user", "share of one user", 30.5, 1.0, 1, 40, 90, 1000, 9000)
    shop.live.change(lambda now: hold(now, held, actor="guard", reason="a flood", now_ms=5))
    assert shop.step(60_000) and shop.get(trial.name).runs
    shop.live.change(lambda now: release(now, actor="ann", reason="a sale", now_ms=6))
    # A promotion that a crash interrupted continues.
    shop.experiments.change(trial.name, lambda now: now.promote(By("retrain", "better: it was", 9)))
    assert not shop.step() and (shop.known.outcome, shop.known.reason) == ("promoted", "better: it was")


@pytest.mark.parametrize("difference", [-0.5, 0.5])
def test_a_held_trial_is_reported_as_held_and_nothing_is_decided_by_its_comparison(
    shop: Shop, difference: float
) -> None:
    trial = shop.begin()
    shop.publish(trial.name)
    shop.compare(trial.name, difference)
    held = HeldUpdate("steps", "records in a row with rows that are not finite", 20.0, 0.0, 1, 40, 90, 1000, 9000)
    own = Registry(shop.experiments.registry(trial.name))
    own.change(lambda now: hold(now, held, actor="guard", reason="a flood", now_ms=5))
    assert shop.step(60_000) and shop.get(trial.name).runs, "neither promoted nor dropped"
    (told,) = status.reported(shop.settings)
    word, text = status.as_text(told)
    assert word == "held by its guard" and "held by its guard: steps: records in a row" in text
    listed = shop.operator("experiment", "status")
    assert listed.startswith("held by its guard") and "worse" not in listed and "BETTER" not in listed
    assert not shop.step(25 * HOUR_MS)
    assert shop.known.outcome == "failed" and shop.known.reason.startswith("held by its guard: steps")


@pytest.mark.parametrize("difference", [-0.5, 0.5])
@pytest.mark.parametrize("point", ["retrain.due", "retrain.begun", "retrain.judged"])
def test_killed_anywhere_it_goes_on_there(shop: Shop, point: str, difference: float) -> None:
    shop.learn()
    shop.step()
    if point == "retrain.judged":
        assert shop.step(4 * HOUR_MS)
    else:
        with killed_at(point):
            shop.step(4 * HOUR_MS)
        assert shop.step()
    (trial,) = shop.all()
    shop.publish(trial.name)
    shop.compare(trial.name, difference)
    if point == "retrain.judged":
        with killed_at(point):
            shop.step()
        assert shop.known.under_way and shop.is_wanted
    assert not shop.step(60_000)
    assert shop.known.outcome == ("promoted" if difference < 0 else "dropped")
    control = shop.live.control()
    assert control is not None and control.epoch == (2 if difference < 0 else 1)
    assert "by " not in shop.known.reason[:3] and shop.known.reason[:6] in ("better", "worse:")


def test_wrong_schedules_are_refused_and_without_one_there_is_none(tmp_path: Path) -> None:
    for flags, said in (
        (("--retrain.every", "daily"), "'daily' is no span of time"),
        (("--retrain.every", "1d", "--privacy.epsilon", "4", "--trainer.engine", "tensorflow"), "two trainers would"),
    ):
        with pytest.raises(SettingsError, match=said):
            load(flags, {}, "/dev/null")
    without = load(["--paths.state", str(tmp_path)], {}, "/dev/null")
    assert [one.name for one in plans(without)] == [EXPERIMENTS] and status.retrain_status(without, 0) is None
