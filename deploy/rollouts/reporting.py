"""`springtide trial report NAME`: compares the arms of a trial's newest rollout by all evidence in its two topics."""

from __future__ import annotations

import json
import time

from deploy.operate.commands import Say
from deploy.rollouts.driving import RolloutDriver
from state.config.settings import Settings
from state.errors import ControlConflict
from state.log import Log
from state.process.wall_clock import wall_ms
from state.rollouts.report import as_document, as_lines
from state.rollouts.rollouts import Rollouts

SETTLE_S = 30.0
"""How long a report reads the topics at most."""


def say_report(settings: Settings, name: str, output: str, log: Log, say: Say) -> None:
    """Reads all evidence about the newest rollout of a trial, and prints the report.

    Raises:
        ControlConflict: There is no rollout of this name.
        LogError: Kafka does not answer.
    """
    rollouts = Rollouts(settings.registry_dir)
    history = rollouts.history(name)
    if not history:
        raise ControlConflict(f"there is no rollout of {name}", f"start it: `springtide rollout {name}`")
    driver, until_s = RolloutDriver(settings, log, rollouts, history[-1], wall_ms), time.monotonic() + SETTLE_S
    try:
        while not (driver.caught_up or time.monotonic() > until_s):
            driver.read()
    finally:
        driver.close()
    if output == "json":
        say(json.dumps(as_document(driver.report(), history), indent=2))
    else:
        for line in as_lines(driver.report(), history):
            say(line)
