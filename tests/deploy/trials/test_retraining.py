"""The scheduled retrain: begun when it is due, judged once, promoted or dropped with the reason, wherever it was killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from deploy.trials import offered, retrain_told, telling
from deploy.trials.process_plan import RETRAIN, plans
from deploy.trials.retraining import Retrainer
from state import layout
from state.config.loading import load
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import SettingsError
from state.features.ages import DAY_MS
from state.features.spec import FeatureSpec
from state.process import killpoints
from state.registry.control import HeldUpdate, hold, release, start, train
from state.registry.registry import Registry
from state.rollouts import rollout
from state.rollouts.rollouts import Rollouts
from state.trials import comparison
from state.trials.comparison import Pair, PairedComparison
from state.trials.past import read_past
from state.trials.retraining import Retraining, Retrainings
from state.trials.trial import Trial, Trials
from tests.deploy.operating import NOW_MS, Operator, draft, files

HOUR_MS = 3_600_000
FLAGS = ("--retrain.every", "4h", "--retrain.days", "2", "--retrain.rows", "1000", "--retrain.limit", "2h")


class Dead(BaseException):
    """In place of kill -9."""


class Shop:
    """A live registry with a version, and the process of the schedule, stepped by hand at a time that is told."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.settings: Settings = load(["--paths.state", str(folder), *FLAGS, *flags], {}, "/dev/null")
        self.live, self.trials = Registry(self.settings.registry_dir), Trials(self.settings.state_dir)
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

    def begin(self) -> Trial:
        """A retrain begins."""
        self.learn()
        assert not self.step()
        assert self.step(4 * HOUR_MS)
        (found,) = self.trials.all()
        return found

    def compare(self, name: str, difference: float, rows: int = 4000) -> None:
        """Both trainers scored rows, whose losses differ by so much on average."""
        drawn, made = np.random.default_rng(3), PairedComparison(0.05, 10_000)
        live = drawn.random(rows) + 2.0
        own = live + difference + 0.1 * drawn.standard_normal(rows)
        made.take([Pair(7, drawn.integers(0, 512, rows).astype(np.uint16), live, own)])
        comparison.write(self.trials.folder(name), made)

    def publish(self, name: str) -> int:
        """The trial's trainer has a version; returns it."""
        own = Registry(self.trials.registry(name))
        return own.publish(replace(draft(1, None, epoch=2), spec=self.spec), files()).version

    @property
    def known(self) -> Retraining:
        found = Retrainings(self.settings.state_dir).read()
        assert found is not None
        return found

    @property
    def is_wanted(self) -> bool:
        (plan,) = (one for one in plans(self.settings) if one.name == RETRAIN)
        assert plan.wanted is not None
        return plan.wanted()

    def told(self) -> tuple[str, str]:
        found = retrain_told.look(self.settings, self.now_ms)
        assert found is not None
        return retrain_told.as_text(found)

    def metrics(self) -> str:
        registry = CollectorRegistry()
        offered.offer(registry, self.settings)
        return generate_latest(registry).decode()


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path / "state")


@pytest.fixture
def deaths() -> Iterator[list[str]]:
    yield []
    killpoints.armed = None


def kill_at(point: str, deaths: list[str]) -> None:
    def strike() -> None:
        deaths.append(point)
        raise Dead

    killpoints.armed = killpoints.Armed(point, 1, strike)


def test_one_begins_when_it_is_due_and_never_two_and_missed_times_are_not_made_up_for(shop: Shop) -> None:
    assert shop.is_wanted, "nobody looked at the schedule yet"
    trial = shop.begin()
    assert trial.name.startswith("retrain-") and (trial.origin, trial.version, trial.actor) == (
        "clicks",
        None,
        "retrain",
    )
    past = read_past(shop.trials.registry(trial.name))
    newest = shop.live.manifest(1)
    assert past is not None and (past.version, past.marks, past.log) == (1, newest.marks, newest.log)
    assert past.until_ms - past.begin_ms == 2 * DAY_MS and past.until_ms == newest.event_time_ms
    assert shop.told()[0] == "runs" and "springtide_retrain_under_way 1.0" in shop.metrics()
    # While it is under way no other begins, however late that is.
    assert shop.step(HOUR_MS) and len(shop.trials.all()) == 1
    shop.compare(trial.name, 0.5)
    assert not shop.step(9 * HOUR_MS)
    # Two were missed: one begins, and the next one four hours after it.
    begun_ms = shop.known.begun_at_ms
    assert shop.step() and shop.known.begun_at_ms == begun_ms + 10 * HOUR_MS
    assert shop.step(HOUR_MS)
    assert len(shop.trials.all()) == 2


def test_one_that_is_better_is_promoted(shop: Shop) -> None:
    trial = shop.begin()
    version = shop.publish(trial.name)
    shop.compare(trial.name, -0.5)
    assert not shop.step(60_000)
    control, promoted = shop.live.control(), shop.trials.read(trial.name)
    assert control is not None and control.plan is not None
    assert (control.epoch, control.actor, control.plan["trial"]) == (2, "retrain", trial.name)
    assert control.plan["version"] == version and control.reason.startswith("better: -0.")
    assert (promoted.wanted, promoted.promoted_epoch) == ("promoted", 2)
    assert (shop.known.outcome, shop.known.promoted_at_ms) == ("promoted", shop.now_ms)
    word, text = shop.told()
    assert word == "PROMOTED" and "over 4,000 rows" in text and text.endswith("the next one begins in 3 h 59 min")
    assert 'springtide_retrain_outcome{outcome="promoted"} 1.0' in shop.metrics()


@pytest.mark.parametrize(
    ("difference", "rows", "after_ms", "outcome", "said"),
    [
        (0.5, 4000, 60_000, "dropped", "worse: +0."),
        (0.0, 4000, 60_000, "dropped", "no better: "),
        (0.0, 400, 3 * HOUR_MS, "dropped", "no better after 3 h 0 min (retrain.limit): "),
        (None, 0, 3 * HOUR_MS, "failed", "not a row could be compared after 3 h 0 min"),
    ],
)
def test_one_that_is_not_is_dropped_with_the_reason(
    shop: Shop, difference: float | None, rows: int, after_ms: int, outcome: str, said: str
) -> None:
    trial = shop.begin()
    if difference is not None:
        shop.compare(trial.name, difference, rows)
    assert not shop.step(after_ms)
    assert (shop.known.outcome, shop.trials.read(trial.name).wanted) == (outcome, "stopped")
    assert shop.known.reason.startswith(said) and shop.trials.read(trial.name).reason == shop.known.reason
    assert f'springtide_retrain_outcome{{outcome="{outcome}"}} 1.0' in shop.metrics()
    control = shop.live.control()
    assert control is not None and control.epoch == 1
    assert said in shop.operator("trial", "list", *FLAGS)


def test_too_few_rows_say_nothing_yet(shop: Shop) -> None:
    trial = shop.begin()
    shop.compare(trial.name, 0.0, 400)
    assert shop.step(60_000) and shop.trials.read(trial.name).runs and shop.is_wanted


def test_what_others_decide_of_its_trial_counts(shop: Shop) -> None:
    trial = shop.begin()
    shop.operator("trial", "stop", trial.name, "--reason", "the machine is needed")
    assert not shop.step() and shop.known.outcome == "dropped"
    assert shop.known.reason.endswith(": the machine is needed") and shop.known.reason.startswith("by ")
    # The live trainer goes back: the process of trials ends those that learned what is taken back.
    assert shop.step(4 * HOUR_MS)
    name = shop.known.name
    who: dict[str, Any] = {"actor": "trials", "reason": "the live trainer went on in epoch 2", "now_ms": 9}
    shop.trials.change(name, lambda now: now.wants("ended", **who))
    assert not shop.step() and shop.known.reason == "it ended: the live trainer went on in epoch 2"


def test_a_rollout_of_it_is_waited_for_and_one_that_went_back_drops_it(shop: Shop) -> None:
    trial, rollouts = shop.begin(), Rollouts(shop.settings.registry_dir)
    shop.compare(trial.name, -0.5)
    begun = rollout.start(None, trial.name, (5.0,), 60.0, (0, 0), actor="ann", reason="to see", now_ms=1)
    rollouts.propose(begun)
    assert shop.step(9 * HOUR_MS) and shop.trials.read(trial.name).runs
    rollouts.change(lambda now: rollout.back(now, actor="gate", reason="it is slower", now_ms=2))
    assert not shop.step()
    assert (shop.known.outcome, shop.known.reason) == ("dropped", "its rollout went back: it is slower (gate)")


def test_where_a_rollout_is_asked_for_better_alone_is_not_enough(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "state", "--retrain.rollout", "on")
    trial, rollouts = shop.begin(), Rollouts(shop.settings.registry_dir)
    shop.publish(trial.name)
    shop.compare(trial.name, -0.5)
    assert shop.step(HOUR_MS) and shop.trials.read(trial.name).runs
    rollouts.propose(rollout.start(None, trial.name, (100.0,), 60.0, (0, 0), actor="ann", reason="to see", now_ms=1))
    assert shop.step(HOUR_MS)
    rollouts.change(lambda now: rollout.begin(now, actor="gate", reason="the trial answers", now_ms=2))
    rollouts.change(lambda now: rollout.next_step(now, actor="gate", reason="nothing against it", now_ms=2))
    assert not shop.step() and shop.known.outcome == "promoted" and shop.known.reason.startswith("its rollout is done")
    # Nobody opened one of the next: it is too late then.
    assert shop.step(4 * HOUR_MS)
    shop.compare(shop.known.name, -0.5)
    assert not shop.step(3 * HOUR_MS)
    assert shop.known.outcome == "dropped" and shop.known.reason.startswith("better, and no rollout of it is done")


def test_one_that_cannot_begin_failed_and_says_why(shop: Shop) -> None:
    assert not shop.step()
    assert not shop.step(4 * HOUR_MS)
    assert shop.known.outcome == "failed" and "no version that learned anything yet" in shop.known.reason
    assert shop.trials.all() == [] and 'outcome{outcome="failed"} 1.0' in shop.metrics()
    # The next one begins as if nothing had been.
    shop.learn()
    assert shop.step(4 * HOUR_MS)


def test_what_the_guard_holds_comes_before_a_promotion(shop: Shop) -> None:
    trial = shop.begin()
    shop.publish(trial.name)
    shop.compare(trial.name, -0.5)
    held = HeldUpdate("user", "share of one user", 30.5, 1.0, 1, 40, 90, 1000, 9000)
    shop.live.change(lambda now: hold(now, held, actor="guard", reason="a flood", now_ms=5))
    assert shop.step(60_000) and shop.trials.read(trial.name).runs
    shop.live.change(lambda now: release(now, actor="ann", reason="a sale", now_ms=6))
    assert not shop.step() and shop.known.outcome == "promoted"


@pytest.mark.parametrize("difference", [-0.5, 0.5])
def test_a_held_trial_is_reported_as_held_and_nothing_is_decided_by_its_comparison(
    shop: Shop, difference: float
) -> None:
    trial = shop.begin()
    shop.publish(trial.name)
    shop.compare(trial.name, difference)
    held = HeldUpdate("steps", "records in a row with rows that are not finite", 20.0, 0.0, 1, 40, 90, 1000, 9000)
    own = Registry(shop.trials.registry(trial.name))
    own.change(lambda now: hold(now, held, actor="guard", reason="a flood", now_ms=5))
    assert shop.step(60_000) and shop.trials.read(trial.name).runs, "neither promoted nor dropped"
    (told,) = telling.look(shop.settings)
    word, text = telling.as_text(told)
    assert word == "held by its guard" and "held by its guard: steps: records in a row" in text
    listed = shop.operator("trial", "list").splitlines()[1]
    assert "held by its guard" in listed and "worse" not in listed and "BETTER" not in listed
    assert not shop.step(2 * HOUR_MS)
    assert shop.known.outcome == "failed" and shop.known.reason.startswith("held by its guard: steps")


def test_a_trial_that_is_paused_or_has_no_trainer_is_reported_so(shop: Shop) -> None:
    trial = shop.begin()
    shop.publish(trial.name)
    shop.compare(trial.name, 0.5)
    own = Registry(shop.trials.registry(trial.name))

    def word() -> str:
        (told,) = telling.look(shop.settings)
        return telling.as_text(told)[0]

    assert word() == "no trainer"
    with DirectoryLock(own.path, layout.TRAINER_LOCK):
        assert word() == "worse"
        own.change(lambda now: train(now, False, actor="ann", reason="look", now_ms=9))
        assert word() == "paused"
    own.change(lambda now: train(now, True, actor="ann", reason="fine", now_ms=10))
    assert word() == "worse", "the process that wrote the lock file still runs"
    content = json.loads((own.path / layout.TRAINER_LOCK).read_text())
    (own.path / layout.TRAINER_LOCK).write_text(json.dumps(content | {"started_s": 0.0}))
    assert word() == "no trainer"


@pytest.mark.parametrize("difference", [-0.5, 0.5])
@pytest.mark.parametrize("point", ["retrain.due", "retrain.begun", "retrain.judged"])
def test_killed_anywhere_it_goes_on_there(shop: Shop, deaths: list[str], point: str, difference: float) -> None:
    shop.learn()
    shop.step()
    if point != "retrain.judged":
        kill_at(point, deaths)
        with pytest.raises(Dead):
            shop.step(4 * HOUR_MS)
    assert shop.step(0 if deaths else 4 * HOUR_MS)
    (trial,) = shop.trials.all()
    shop.publish(trial.name)
    shop.compare(trial.name, difference)
    if point == "retrain.judged":
        kill_at(point, deaths)
        with pytest.raises(Dead):
            shop.step()
        assert shop.known.under_way and shop.is_wanted
    assert not shop.step(60_000)
    assert deaths == [point] and shop.known.outcome == ("promoted" if difference < 0 else "dropped")
    control = shop.live.control()
    assert control is not None and control.epoch == (2 if difference < 0 else 1)
    assert "by " not in shop.known.reason[:3] and shop.known.reason[:6] in ("better", "worse:")


def test_a_promotion_that_was_cut_short_goes_on(shop: Shop) -> None:
    trial = shop.begin()
    shop.publish(trial.name)
    who: dict[str, Any] = {"actor": "retrain", "reason": "better: it was", "now_ms": 9}
    shop.trials.change(trial.name, lambda now: now.wants("promoting", **who))
    assert not shop.step() and (shop.known.outcome, shop.known.reason) == ("promoted", "better: it was")


def test_wrong_schedules_are_refused_and_without_one_there_is_none(tmp_path: Path) -> None:
    for flags, said in (
        (("--retrain.every", "daily"), "'daily' is no span of time"),
        (("--retrain.limit", ""), "is no span of time"),
        (("--retrain.every", "1d", "--privacy.epsilon", "4", "--trainer.engine", "tensorflow"), "two trainers would"),
    ):
        with pytest.raises(SettingsError, match=said):
            load(flags, {}, "/dev/null")
    without = load(["--paths.state", str(tmp_path)], {}, "/dev/null")
    assert [one.name for one in plans(without)] == ["trials"] and retrain_told.look(without, 0) is None
