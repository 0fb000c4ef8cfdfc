"""The process that runs trials, as `springtide up` starts it: only while there is a trial to run, or one to remove."""

from __future__ import annotations

import sys

from deploy.children.supervisor import ProcessPlan
from state.config.settings import Settings
from state.trials.trial import Trials

TRIALS = "trials"
STOP_S = 30.0


def plan(settings: Settings) -> ProcessPlan:
    """The process; settings reach it by the environment."""
    trials = Trials(settings.state_dir)
    command = (sys.executable, "-m", "deploy.trials.process")
    return ProcessPlan(TRIALS, command, STOP_S, wanted=lambda: bool(trials.open()))
