"""The process that serves a trial, as `springtide up` starts it while the rollout of a local trial is not over."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from deploy.children.supervisor import ProcessPlan
from state import layout
from state.config.settings import Settings
from state.errors import RegistryError
from state.rollouts.rollout import Rollout
from state.rollouts.rollouts import Rollouts

TRIAL_HOST = "trial-host"
STOP_S = 30.0
_HERE = re.compile(r"http://(127\.0\.0\.1|localhost|\[::1\]):\d{1,5}")


def plans(settings: Settings) -> list[ProcessPlan]:
    """Returns the process if `rollout.address` is on this machine; it reads settings from its environment.

    >>> plans(Settings())
    []
    """
    if not is_here(settings.rollout.address):
        return []
    command = (sys.executable, "-m", "deploy.rollouts.host")
    return [ProcessPlan(TRIAL_HOST, command, STOP_S, wanted=wanted(settings))]


def is_here(address: str) -> bool:
    """Returns whether an address is a loopback address with a port.

    >>> is_here("http://127.0.0.1:8601"), is_here("http://trial-host:8501"), is_here("")
    (True, False, False)
    """
    return _HERE.fullmatch(address) is not None


def wanted(settings: Settings) -> Callable[[], bool]:
    """Returns a function that tells whether there is a rollout to serve."""
    rollouts, state = Rollouts(settings.registry_dir), settings.state_dir

    def look() -> bool:
        try:
            return hosted(rollouts.newest(), state)
        except RegistryError:
            return False

    return look


def hosted(newest: Rollout | None, state: Path) -> bool:
    """Returns whether this machine must serve the newest rollout: it is not over, and its trial is local."""
    return newest is not None and not newest.is_over and layout.trial_registry(state, newest.name).is_dir()
