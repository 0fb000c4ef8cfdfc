"""Trials run without `springtide up`: while there is one, and its end is not the end of who waits for the next."""

from __future__ import annotations

import os
import signal
import sys

import psutil
import pytest

from deploy.kafka.configuration import free_port
from deploy.watch import scrape
from state.config.settings import Settings
from state.trials.trial import Trials
from tests.deploy.operating import Operator
from tests.deploy.trials.test_process import settings as settings
from tests.deploy.trials.test_process import until


def commands(of: psutil.Popen) -> list[str]:
    """What runs below a process."""
    found = []
    for one in of.children(recursive=True):
        try:
            found += [word for word in one.cmdline() if word in ("deploy.trials.process", "trainer.loop")]
        except psutil.Error:
            continue
    return found


@pytest.mark.nightly
def test_a_trial_runs_while_it_is_wanted_and_then_the_next_one_is_waited_for(settings: Settings) -> None:
    operator, trials, port = Operator(settings.state_dir), Trials(settings.state_dir), free_port()
    environment = {name: text for name, text in os.environ.items() if not name.startswith("SPRINGTIDE_")}
    environment |= settings.environment() | {"SPRINGTIDE_TRIALS_METRICS_PORT": str(port)}
    beside = psutil.Popen([sys.executable, "-m", "deploy.trials.beside"], env=environment)
    try:
        operator("trial", "start", "tried", "--from", "nothing", "--reason", "to see")
        until(lambda: commands(beside) == ["deploy.trials.process", "trainer.loop"], "its trainer does not run")
        operator("trial", "stop", "tried", "--reason", "enough")
        until(lambda: not trials.open() and commands(beside) == [], "it is not removed")
        found = scrape.scrape({"trials": f"http://127.0.0.1:{port}/metrics"})["trials"]
        assert found.value("springtide_up_starts_total", part="trials") == 1.0
        assert found.value("springtide_up_deaths_in_a_row", part="trials") == 0.0
        beside.send_signal(signal.SIGTERM)
        assert beside.wait(60) == 0
    finally:
        if beside.poll() is None:
            beside.kill()
            beside.wait()
