"""Gives an operator's commands from within a process: each is read by the command line's own parser and answers in JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from deploy.command_line import parser
from deploy.operate import control, history, rollback, versions
from deploy.operate.commands import Say
from state.config.settings import Settings
from state.errors import SpringtideError

COMMANDS = {
    "versions": versions.versions,
    "history": history.history,
    "masks": history.masks,
    "rollback": rollback.rollback,
    "pin": control.pin,
    "follow": control.follow,
    "unmask": control.unmask,
    **dict.fromkeys(control.SWITCHES, control.switch),
}
"""Command -> what does it; it says one JSON document."""


def give(settings: Settings, words: Sequence[str], now_ms: int) -> Any:
    """Gives a command; returns what it says.

    Args:
        settings: Of the system.
        words: As they are typed behind `springtide`. What comes from elsewhere is written `--option=VALUE`, so that it is
            never taken for an option.
        now_ms: Wall clock.

    Raises:
        SettingsError: The words are not as they should be.
        SpringtideError: As the command.
    """
    said: list[str] = []
    say: Say = said.append
    line = [*words, "--output=json"]
    COMMANDS[words[0]](settings, parser(line).parse_args(line), now_ms, say)
    return json.loads(said[-1])


def status_of(error: SpringtideError) -> int:
    """The status of HTTP of a command's error: whose fault it is, or what it crossed.

    >>> from state.errors import ControlConflict, LogError, SettingsError
    >>> status_of(SettingsError("--minutes x")), status_of(ControlConflict("generation 4")), status_of(LogError("away"))
    (400, 409, 503)
    """
    kinds = {"SettingsError": 400, "UnknownVersion": 404, "ControlConflict": 409, "UnfitVersion": 409, "UnfitMask": 409}
    return kinds.get(type(error).__name__, error.http_status)
