"""A trial on the running loop: beside the live trainer on the same rows, killed, stopped, promoted and taken back."""

from __future__ import annotations

import os
import signal
from typing import Any

import psutil

from state.trials.trial import Trials
from tests.e2e.running import Loop, until

ROWS, SCORED_S = 200, 400.0


def listed(loop: Loop, name: str) -> dict[str, Any]:
    """A trial as the command lists it."""
    found = [one for one in loop.springtide("trial", "list") if one["name"] == name]
    assert len(found) == 1
    return dict(found[0])


def scored(loop: Loop, name: str, rows: int = ROWS) -> dict[str, Any]:
    """Waits until so many rows were scored by both trainers."""

    def look() -> dict[str, Any] | None:
        compared = listed(loop, name)["compared"]
        return dict(compared) if compared and compared["rows"] >= rows else None

    # A trial steps back behind everybody else.
    return until(look, lambda: f"trial {name} is not compared: {listed(loop, name)}\n{loop.logs()}", SCORED_S)


def process_of(loop: Loop, name: str, module: str) -> psutil.Process | None:
    """A process of a trial, by what it runs."""
    registry = f"--paths.registry={Trials(loop.settings.state_dir).registry(name)}"
    for one in loop.processes():
        try:
            words = one.cmdline()
        except psutil.Error:
            continue
        if module in words and registry in words:
            return one
    return None


def trainer_of(loop: Loop, name: str) -> psutil.Process | None:
    """The process of a trial's trainer."""
    return process_of(loop, name, "trainer.loop")


def test_a_trial_learns_the_same_rows_beside_the_live_one_through_a_kill_and_goes_live_and_back(loop: Loop) -> None:
    loop.springtide("follow", "--reason", "a test begins")
    begun = loop.springtide("trial", "start", "again", "--reason", "are equal ones told to be equal?")
    loop.springtide("trial", "start", "small", "--set", "model.hidden=8", "--reason", "is less enough?")
    assert begun["origin"] == "live" and begun["version"]

    # 1. On the same rows what is the same differs in no bit, and what is not differs.
    same = scored(loop, "again")
    assert (same["differing"], same["verdict"]) == (0, "the same")
    assert same["live_log_loss"] == same["trial_log_loss"] > 0
    other = scored(loop, "small")
    assert other["differing"] > 0 and other["live_log_loss"] != other["trial_log_loss"]

    # 2. It is told: in status, and on /metrics.
    told = {one["name"]: one for one in loop.springtide("status")["trials"]}
    assert told["small"]["overrides"] == {"model.hidden": "8"} and told["again"]["compared"]["rows"] >= ROWS
    metrics = loop.metrics("up")
    assert (metrics.value("springtide_trial_rows", trial="again") or 0) >= ROWS
    assert metrics.value("springtide_trial_difference", trial="again", end="mean") == 0.0

    # 3. Its trainer is killed: it learns again what was not durable, and each row is paired once all the same.
    killed = until(lambda: trainer_of(loop, "again"), "no trainer")
    assert killed.nice() > 0 and len(killed.cpu_affinity()) == loop.settings.trials.cores
    os.kill(killed.pid, signal.SIGKILL)

    def another() -> bool:
        found = trainer_of(loop, "again")
        return found is not None and found.pid != killed.pid

    until(another, "its trainer is not there again")
    after = scored(loop, "again", scored(loop, "again")["rows"] + ROWS)
    assert (after["differing"], after["unlike"]) == (0, 0)

    # 4. Stopped, it leaves its comparison, and nothing that it learned.
    trials = Trials(loop.settings.state_dir)
    loop.springtide("trial", "stop", "small", "--reason", "it is not")
    until(lambda: "small" not in trials.open(), "what it learned is not removed")
    assert trainer_of(loop, "small") is None
    assert listed(loop, "small")["compared"]["rows"] >= ROWS

    # 5. Promoted, the live trainer goes on from it in a new epoch, and answers follow.
    epoch = int(loop.springtide("history")[-1]["epoch"])
    done = loop.springtide("trial", "promote", "again", "--reason", "it is as good")
    assert done["control"]["epoch"] == epoch + 1 and done["trial"]["wanted"] == "promoted"
    user = "one-after-the-promotion"
    answer = loop.answer_trained_on(user, loop.click([(user, "lamp", "light", "purchase")] * 5))
    assert answer["version"]["epoch"] == epoch + 1
    until(lambda: "again" not in trials.open(), "what it learned is not removed")
    assert trainer_of(loop, "again") is None
    until(lambda: not list((loop.settings.registry_dir / "losses").glob("*")), "losses of rows are still written")

    # 6. And it is taken back as anything else.
    base = str(done["control"]["base"])
    loop.springtide("rollback", "--to", base, "--reason", "to see", "--follow-when-caught-up")
    answer = loop.answer_trained_on(user, loop.click([(user, "lamp", "light", "purchase")]))
    assert answer["version"]["epoch"] == epoch + 2


def test_a_rollback_ends_a_trial_that_learned_what_is_taken_back(loop: Loop) -> None:
    loop.springtide("follow", "--reason", "a test begins")
    loop.springtide("trial", "start", "outdated", "--reason", "to see")
    to = str(loop.kept()[0])
    loop.springtide("rollback", "--to", to, "--reason", "to see what becomes of it", "--follow-when-caught-up")
    until(lambda: listed(loop, "outdated")["wanted"] == "ended", "the trial goes on")
    ended = listed(loop, "outdated")
    assert "rollback by" in ended["reason"] and ended["actor"] == "trials"
    until(lambda: "outdated" not in Trials(loop.settings.state_dir).open(), "what it learned is not removed")
