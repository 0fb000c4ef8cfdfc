"""The process that answers for a trial, as `springtide up` starts it: only while a rollout of a trial of this machine is not over."""

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
    """The process, where `rollout.address` is one of this machine; settings reach it by the environment.

    >>> plans(Settings())
    []
    """
    if not is_here(settings.rollout.address):
        return []
    command = (sys.executable, "-m", "deploy.rollouts.host")
    return [ProcessPlan(TRIAL_HOST, command, STOP_S, wanted=wanted(settings))]


def is_here(address: str) -> bool:
    """Whether an address names a port of this machine alone.

    >>> is_here("http://127.0.0.1:8601"), is_here("http://trial-host:8501"), is_here("")
    (True, False, False)
    """
    return _HERE.fullmatch(address) is not None


def wanted(settings: Settings) -> Callable[[], bool]:
    """Says whether there is a rollout to answer for."""
    rollouts, state = Rollouts(settings.registry_dir), settings.state_dir

    def look() -> bool:
        try:
            return hosted(rollouts.newest(), state)
        except RegistryError:
            return False

    return look


def hosted(newest: Rollout | None, state: Path) -> bool:
    """Whether the newest rollout is to be answered for here: it is not over, and its trial is one of this machine."""
    return newest is not None and not newest.is_over and layout.trial_registry(state, newest.name).is_dir()
