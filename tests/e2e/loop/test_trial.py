"""An experiment on the running loop: it learns the rows of the live trainer, is compared with it, and is promoted."""

from __future__ import annotations

from typing import Any

import psutil

from state.experiments.experiment import Experiments
from tests.e2e.running import Loop, until

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
