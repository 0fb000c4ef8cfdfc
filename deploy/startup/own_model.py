"""Checks a preprocessing and a ranker or tower of the user's own before anything starts: `springtide check-model`, `springtide up`.

Each check is a process of the part that knows how: TensorFlow is loaded
there and gone afterwards. Ranker and tower are checked behind the preprocessing.
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
    """The functions of the user's own that settings name.

    >>> own(Settings())
    []
    """
    given, default = settings.model, Model()
    return [getattr(given, name) for name in FUNCTIONS if getattr(given, name) != getattr(default, name)]


def is_own(settings: Settings) -> bool:
    """Whether there is one."""
    return bool(own(settings))


def check(settings: Settings, say: Callable[[str], None]) -> None:
    """Checks what is the user's own and returns; where all functions are the default and `model.options` is empty there is nothing to do.

    Raises:
        SettingsError: A function cannot be loaded, or nothing reads one of `model.options`.
        ProgramError: A function is not what it has to be, or does not lower to LiteRT.
    """
    if not is_own(settings) and not settings.model.options:
        return
    with tempfile.TemporaryDirectory(prefix="springtide-model-") as folder:
        graph = []
        if settings.model.preprocessing != Model().preprocessing:
            say(run("streaming.preprocessing_check", settings, "--keep", folder))
            graph = ["--transform", folder]
        say(run("trainer.checks", settings, *graph))


def check_tower(settings: Settings) -> None:
    """Checks the ranker or the tower alone; where both are the default there is nothing to do.

    Raises:
        SettingsError: It cannot be loaded.
        ProgramError: It is not what it has to be, or does not lower to LiteRT.
    """
    if (settings.model.ranker, settings.model.tower) != (Model().ranker, Model().tower):
        run("trainer.checks", settings)


def run(module: str, settings: Settings, *words: str) -> str:
    """Runs one check as a process with these settings; returns what it said.

    Raises:
        SettingsError: It ended with 2; the message is its own.
        ProgramError: It ended otherwise but well; the message is its own.
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
