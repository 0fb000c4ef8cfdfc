"""The command line of `springtide`: its commands and what each of them runs; `commands.toml` has their options."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Callable, Sequence

from state.config.settings import Settings
from state.process.commands import SETTINGS_HELP, RefusingParser, add_commands

PROCESSES = {
    "up": "deploy.up",
    "stream": "streaming.pipeline",
    "train": "trainer.loop",
    "train-worker": "trainer.worker",
    "serve": "deploy.serve",
    "console": "deploy.console.server",
    "validate": "deploy.validation.process",
    "segments": "deploy.segments.command",
    "webhook": "deploy.webhook",
    "flink": "deploy.flink.command",
    "status": "deploy.status",
    "probe": "deploy.probe",
    "verify": "trainer.verify",
    "compact": "trainer.compactor",
    "rebuild-history": "streaming.rebuild",
    "export": "trainer.exporting.command",
    "upgrade": "trainer.upgrade",
    "capacity": "deploy.capacity",
    "bootstrap": "streaming.bootstrap",
    "replay": "deploy.replay",
    "evaluate": "evaluation.command",
    "attributes": "deploy.attributes",
}
"""A command that runs as a process -> its module."""
_CHANGE = "deploy.operate.control:change"
OPERATIONS = {
    "versions": "deploy.operate.versions:versions",
    **dict.fromkeys(("pin", "label", "follow", "hold", "release", "pause", "resume"), _CHANGE),
    "rollback": "deploy.operate.rollback:rollback",
    "erase": "deploy.operate.erase:erase",
    "masks": "deploy.operate.control:masks",
    "unmask": _CHANGE,
    "jumps": "deploy.operate.jumps:jumps",
    "schema": "deploy.operate.schema:schema",
    "backup": "deploy.backup.commands:backup",
    "restore": "deploy.backup.commands:restore",
    "check-model": "deploy.cli:check_model",
    "experiment": "deploy.experiments.commands:experiment",
    "history": "deploy.operate.control:history",
    "config": "deploy.cli:config",
}
"""An operator's command -> its function, whose modules are imported only if the command is given."""
READERS = ("stream", "train")  # stop at a gap; continue if the loss is accepted
OWN_HELP = [name for name in PROCESSES if name not in (*READERS, "serve", "console", "validate", "webhook", "compact")]
"""Commands that parse their options in their own modules, and explain them there."""
Command = Callable[[Settings, argparse.Namespace, int, Callable[[str], None]], None]
"""Settings, options, the wall clock in ms, and what prints. It raises a SpringtideError that is for the operator."""


def operation(name: str) -> Command:
    """Returns the function of an operator's command."""
    module, _, function = OPERATIONS[name].partition(":")
    command: Command = getattr(importlib.import_module(module), function)
    return command


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *values: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"springtide {version('springtide')}")
        except PackageNotFoundError:
            print("springtide, run from its source and not installed")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line; settings have been removed from the arguments before."""
    root = RefusingParser(
        prog="springtide",
        description="User profiles that learn from every click.",
        epilog=SETTINGS_HELP,
        allow_abbrev=False,
    )
    root.add_argument("--version", action=_Version, nargs=0, help="show the release and exit")
    add_commands(root, "command", (*PROCESSES, *OPERATIONS), OWN_HELP)
    return root


def with_times(words: Sequence[str]) -> list[str]:
    """Joins an option and a relative time, which argparse would mistake for another option.

    >>> with_times(["rollback", "--before", "-10m", "--dry-run"])
    ['rollback', '--before=-10m', '--dry-run']
    """
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] in ("--before", "--skip-time") and re.match(r"-\d", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined
