"""Experiments on the running loop: shadow, rollout and scheduled retrain."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from playwright.sync_api import Browser, expect

from deploy.experiments import status as experiments
from deploy.watch.scrape import serving_address
from state.experiments.evidence import LIVE, TRIAL
from state.experiments.experiment import Experiments, Schedule
from state.experiments.past import read_past
from state.process.environment import wall_ms
from state.registry.registry import Registry
from tests.e2e.loop.test_page import CHROMIUM, PATIENCE_MS
from tests.e2e.loop.test_page import browser as browser
from tests.e2e.running import ROOT, Loop, until

ROWS, SCORED_S = 200, 400.0


def listed(loop: Loop, name: str) -> dict[str, Any]:
    """An experiment as the command lists it."""
    found = [one for one in loop.springtide("experiment", "status") if one["name"] == name]
    assert len(found) == 1
    return dict(found[0])


def scored(loop: Loop, name: str, rows: int = ROWS) -> dict[str, Any]:
    """Waits until so many rows were scored by both trainers."""

    def look() -> dict[str, Any] | None:
        compared = listed(loop, name)["compared"]
        return dict(compared) if compared and compared["rows"] >= rows else None

    # Its trainer has the lowest priority.
    return until(look, lambda: f"experiment {name} is not compared: {listed(loop, name)}\n{loop.logs()}", SCORED_S)


def process_of(loop: Loop, name: str, module: str) -> psutil.Process | None:
    """A process of an experiment, by what it runs."""
    registry = f"--paths.registry={Experiments(loop.settings).registry(name)}"
    for one in loop.processes():
        try:
            words = one.cmdline()
        except psutil.Error:
            continue
        if module in words and registry in words:
            return one
    return None


def trainer_of(loop: Loop, name: str) -> psutil.Process | None:
    """The process of an experiment's trainer."""
    return process_of(loop, name, "trainer.loop")


def test_an_experiment_learns_the_same_rows_as_the_live_trainer_and_goes_live(loop: Loop) -> None:
    loop.springtide("follow", "--reason", "a test begins")
    begun = loop.springtide("experiment", "start", "again", "--reason", "are equal ones reported as equal?")
    assert begun["origin"] == "live" and begun["version"]

    # 1. The same model on the same rows differs in no bit.
    same = scored(loop, "again")
    assert (same["differing"], same["verdict"]) == (0, "the same")
    assert same["live_log_loss"] == same["trial_log_loss"] > 0

    # 2. Status and /metrics report it; its trainer gives way to all others.
    (reported,) = [one for one in loop.springtide("status")["experiments"] if one["name"] == "again"]
    assert reported["compared"]["rows"] >= ROWS
    metrics = loop.metrics("up")
    assert (metrics.value("springtide_trial_rows", trial="again") or 0) >= ROWS
    assert metrics.value("springtide_trial_difference", trial="again", end="mean") == 0.0
    running = until(lambda: trainer_of(loop, "again"), "no trainer")
    assert running.nice() > 0 and len(running.cpu_affinity()) == loop.settings.trials.cores

    # 3. Promoted, the live trainer goes on from it in a new epoch, and answers follow.
    trials, epoch = Experiments(loop.settings), int(loop.springtide("history")[-1]["epoch"])
    done = loop.springtide("experiment", "promote", "again", "--reason", "it is as good")
    assert done["control"]["epoch"] == epoch + 1 and done["experiment"]["stage"] == "promoted"
    user = "one-after-the-promotion"
    answer = loop.answer_trained_on(user, loop.click([(user, "lamp", "light", "purchase")] * 5))
    assert answer["version"]["epoch"] == epoch + 1
    until(lambda: "again" not in trials.open(), "what it learned is not removed")
    assert trainer_of(loop, "again") is None and listed(loop, "again")["compared"]["rows"] >= ROWS
    until(lambda: not list((loop.settings.registry_dir / "losses").glob("*")), "losses of rows are still written")


NAME = "among-users"
USERS = [f"one-of-a-rollout-{number}" for number in range(60)]


def words(loop: Loop, verb: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "deploy.cli", "experiment", verb, NAME, *more, *loop.flags]


def arms(loop: Loop) -> Counter[str]:
    """How many of the users are answered by which arm."""
    found = httpx.post(str(serving_address(loop.settings, "/v1/profiles:batch")), json={"users": USERS}, timeout=60.0)
    assert found.status_code == 200, found.text
    return Counter(one.get("arm", "") for one in found.json()["profiles"])


def rolled_out(loop: Loop) -> dict[str, Any]:
    """The rollout in the status of the experiment."""
    (found,) = [one for one in experiments.reported(loop.settings) if one["name"] == NAME]
    return dict(found["rollout"])


def answers_for_it(loop: Loop) -> bool:
    """Whether a worker of the trial runs."""
    return process_of(loop, NAME, "deploy.serving.rest") is not None


@pytest.mark.nightly
def test_up_answers_for_a_trial_while_its_rollout_is_not_over(
    loop: Loop, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    loop.springtide("follow", "--reason", "a test begins")
    loop.springtide("experiment", "start", NAME, "--set", "model.hidden=8", "--reason", "what do users say?")
    assert arms(loop) == {"": len(USERS)} and not answers_for_it(loop)
    page = None
    if CHROMIUM is not None:
        known: Browser = request.getfixturevalue("browser")
        page = known.new_page()
        page.goto(f"http://127.0.0.1:{loop.settings.console.port}/")
    log = tmp_path / "driving"
    with log.open("w") as said:
        driving = subprocess.Popen(
            words(loop, "rollout", "--steps", "50,100", "--every", "1h"),
            cwd=ROOT,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    try:
        # 1. Its first step begins once its host answers, and nobody is failed by it.
        until(
            lambda: arms(loop).keys() == {TRIAL, LIVE},
            lambda: f"no trial answers\n{log.read_text()}\n{loop.logs()}",
            SCORED_S,
        )
        assert answers_for_it(loop) and "among-users starting" in log.read_text()
        loop.click([(user, "lamp", "light", "purchase") for user in USERS])

        # 2. It is told: in status, on /metrics, on the page.
        def compared() -> dict[str, Any] | None:
            found = rolled_out(loop)["compared"]
            return dict(found) if found and found["arms"][TRIAL]["answers"] and found["arms"][LIVE]["answers"] else None

        found = until(compared, lambda: f"nothing is compared\n{log.read_text()}")
        assert found["arms"][TRIAL]["failures"] == 0
        (reported,) = [one for one in loop.springtide("status")["experiments"] if one["name"] == NAME]
        assert (reported["rollout"]["phase"], reported["share"]) == ("running", 0.5)
        metrics = loop.metrics("up")
        assert metrics.value("springtide_rollout_share_ratio", trial=NAME) == 0.5
        assert metrics.value("springtide_rollout_stopped", trial=NAME) == 0.0
        assert (metrics.value("springtide_rollout_answers", trial=NAME, arm=TRIAL) or 0) > 0
        if page is not None:
            expect(page.locator("#rollout-told")).to_contain_text("50.0 % of the users", timeout=PATIENCE_MS)
            expect(page.locator("#rollout-table tbody tr")).to_have_count(2, timeout=PATIENCE_MS)
            page.close()

        # 3. With it its host goes, and what that kept.
        subprocess.run(words(loop, "back", "--reason", "enough"), cwd=ROOT, check=True, capture_output=True)
        until(lambda: arms(loop) == {"": len(USERS)}, "users are still told apart")
        host = Experiments(loop.settings).folder(NAME) / "host"
        until(lambda: not answers_for_it(loop) and not host.exists(), lambda: f"its host stays\n{loop.logs()}")
        assert driving.wait(60) == 0, log.read_text()
    finally:
        driving.kill()
        driving.wait()
        # Where it failed, too: an open rollout lets no other begin.
        loop.springtide("experiment", "stop", NAME, "--reason", "enough")
    until(lambda: NAME not in Experiments(loop.settings).open(), "what it learned is not removed")


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
