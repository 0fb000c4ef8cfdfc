"""Checks a custom preprocessing, ranker or tower before anything starts: `springtide check-model`, `springtide up`.

Each check runs in a process of its own, so that TensorFlow is loaded only there. Ranker and tower are checked with the
output of the preprocessing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable

from state.config.sections import Model
from state.config.settings import Settings
from state.errors import ProgramError, SettingsError
from state.process.import_path import for_children

WRONG_USE = 2
FUNCTIONS = ("ranker", "tower", "preprocessing")
"""Settings of `[model]` that name a function."""


def own(settings: Settings) -> list[str]:
    """Returns the custom functions that settings name.

    >>> own(Settings())
    []
    """
    given, default = settings.model, Model()
    return [getattr(given, name) for name in FUNCTIONS if getattr(given, name) != getattr(default, name)]


def is_own(settings: Settings) -> bool:
    """Returns whether settings name a custom function."""
    return bool(own(settings))


def check(settings: Settings, say: Callable[[str], None]) -> None:
    """Checks all custom functions; does nothing if all functions are the default and `model.options` is empty.

    Raises:
        SettingsError: A function cannot be loaded, or no function reads one of `model.options`.
        ProgramError: A function violates its contract, or does not lower to LiteRT.
    """
    if not is_own(settings) and not settings.model.options:
        return
    with tempfile.TemporaryDirectory(prefix="springtide-model-") as folder:
        graph = []
        if settings.model.preprocessing != Model().preprocessing:
            say(run("streaming.preprocessing", settings, "--keep", folder))
            graph = ["--transform", folder]
        say(run("trainer.checks", settings, *graph))


def check_tower(settings: Settings) -> None:
    """Checks only the ranker or the tower; does nothing if both are the default.

    Raises:
        SettingsError: The function cannot be loaded.
        ProgramError: The function violates its contract, or does not lower to LiteRT.
    """
    if (settings.model.ranker, settings.model.tower) != (Model().ranker, Model().tower):
        run("trainer.checks", settings)


def run(module: str, settings: Settings, *words: str) -> str:
    """Runs one check as a process with these settings; returns its output.

    Raises:
        SettingsError: The check ended with status 2; the message is the check's.
        ProgramError: The check ended with another nonzero status; the message is the check's.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SPRINGTIDE_")}
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        env=for_children(environment | settings.environment()),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return done.stdout.strip()
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    message = lines[-1].removeprefix("springtide: ") if lines else f"{module} ended with {done.returncode} in silence"
    raise (SettingsError if done.returncode == WRONG_USE else ProgramError)(message)
