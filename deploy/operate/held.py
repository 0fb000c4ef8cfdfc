"""The update that the trainer's guard holds, with the commands to roll back without suspect clicks or to release."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from deploy.operate.versions import open_registry
from state.config.settings import Settings
from state.errors import SpringtideError
from state.registry.control import HeldUpdate


def look(settings: Settings) -> dict[str, Any] | None:
    """Returns the held update and the commands as JSON values; None if nothing is held or control is unreadable."""
    try:
        control = open_registry(settings).control()
    except (SpringtideError, OSError):
        return None
    return None if control is None or control.held is None else document(control.held)


def document(held: HeldUpdate) -> dict[str, Any]:
    """Describes a held update, with the commands to type.

    >>> from state.registry.control import SuspectClicks
    >>> held = HeldUpdate("user", "share of one user", 30.0, 1.0, 7, 40, 90, 0, 9000, (SuspectClicks("ab" * 16, 2, 5, 80),))
    >>> print("; ".join(document(held)["commands"]))
    springtide rollback --to 7 --skip 2:5-79 --follow-when-caught-up --reason 'guard: user'; springtide release --reason TEXT
    """
    return {**asdict(held), "words": held.in_words(), "commands": [turn_back(held), "springtide release --reason TEXT"]}


def turn_back(held: HeldUpdate) -> str:
    """Returns the rollback command that masks the suspect clicks, ready to run."""
    words = ["springtide", "rollback", *(("--to", str(held.version)) if held.version else ("--before-mask",))]
    for one in held.clicks:
        words += ["--skip", f"{one.partition}:{one.first}-{one.next - 1}"]
    return shlex.join([*words, "--follow-when-caught-up", "--reason", f"guard: {held.rule}"])


def as_text(found: Mapping[str, Any]) -> tuple[str, str]:
    """Formats the held update for `springtide status`: a keyword and a description."""
    back, go_on = found["commands"]
    stays = (
        f"answers stay at version {found['version']}"
        if found["followed"]
        else "answers stay where an operator put them"
    )
    return "HOLDS", f"{found['words']}; {stays}; without these clicks: {back}; where they are good: {go_on}"
