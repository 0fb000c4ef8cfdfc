"""The processes for trials and scheduled retrains, as `springtide up` starts them: only while there is work."""

from __future__ import annotations

import sys

from deploy.children.supervisor import ProcessPlan
from state.config.settings import Settings
from state.config.spans import span_ms
from state.errors import SpringtideError
from state.process.wall_clock import wall_ms
from state.trials.retraining import Retrainings
from state.trials.trial import Trials

TRIALS, RETRAIN = "trials", "retrain"
STOP_S = 30.0


def plans(settings: Settings) -> list[ProcessPlan]:
    """Returns the processes; they read settings from their environment."""
    return [_trials(settings), *([_retrain(settings)] if settings.retrain.every else [])]


def _trials(settings: Settings) -> ProcessPlan:
    trials = Trials(settings.state_dir)
    command = (sys.executable, "-m", "deploy.trials.process")
    return ProcessPlan(TRIALS, command, STOP_S, wanted=lambda: bool(trials.open()))


def _retrain(settings: Settings) -> ProcessPlan:
    known, every_ms = Retrainings(settings.state_dir), span_ms(settings.retrain.every) or 0.0

    def wanted() -> bool:
        try:
            found = known.read()
        except SpringtideError:
            # The process reports the error.
            return True
        return found is None or found.under_way or found.is_due(every_ms, wall_ms())

    return ProcessPlan(RETRAIN, (sys.executable, "-m", "deploy.trials.retraining"), wanted=wanted)
