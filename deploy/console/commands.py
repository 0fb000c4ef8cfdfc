"""Runs operator commands inside a process: the command line's own parser reads them, and they answer in JSON."""

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
"""By command, the function that runs it; the function outputs one JSON document."""


def give(settings: Settings, words: Sequence[str], now_ms: int) -> Any:
    """Runs a command and returns its JSON output.

    Args:
        settings: Settings of the system.
        words: The arguments as typed after `springtide`. Pass untrusted values as `--option=VALUE`, so that they are
            never parsed as options.
        now_ms: Wall clock.

    Raises:
        SettingsError: The arguments are invalid.
        SpringtideError: The command failed.
    """
    said: list[str] = []
    say: Say = said.append
    line = [*words, "--output=json"]
    COMMANDS[words[0]](settings, parser(line).parse_args(line), now_ms, say)
    return json.loads(said[-1])


def status_of(error: SpringtideError) -> int:
    """Returns the HTTP status of a command's error: client error, conflict or server error.

    >>> from state.errors import ControlConflict, LogError, SettingsError
    >>> status_of(SettingsError("--minutes x")), status_of(ControlConflict("generation 4")), status_of(LogError("away"))
    (400, 409, 503)
    """
    kinds = {"SettingsError": 400, "UnknownVersion": 404, "ControlConflict": 409, "UnfitVersion": 409, "UnfitMask": 409}
    return kinds.get(type(error).__name__, error.http_status)
