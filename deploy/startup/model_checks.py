"""Checks the model before anything starts: custom functions, and settings unlike those of the trained registry."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from state import layout
from state.config.sections import Model
from state.config.settings import Settings
from state.errors import ModelMismatch, SpringtideError
from state.features.spec import FeatureSpec
from state.process.part import run_child
from state.process.user_code import for_children
from state.registry.model_fit import require_same_model, version_to_go_on_from
from state.registry.registry import Registry

FUNCTIONS = ("ranker", "tower", "preprocessing")
"""Settings of `[model]` that name a function."""


def own(settings: Settings) -> list[str]:
    """Returns the custom functions that settings name.

    >>> own(Settings())
    []
    """
    model, default = settings.model, Model()
    return [getattr(model, name) for name in FUNCTIONS if getattr(model, name) != getattr(default, name)]


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
    return run_child(module, words, for_children(environment | settings.environment()))


def upgrade_or_refuse(settings: Settings, reason: str | None, say: Callable[[str], None]) -> None:
    """Upgrades the model to these settings if `reason` is given; otherwise refuses other settings and prints the plan.

    Raises:
        ModelMismatch: The settings differ, and no upgrade was requested.
        SpringtideError: The plan cannot be made; existing state stays as it is.
    """
    if reason is not None:
        if not (settings.registry_dir / layout.VERSIONS).is_dir():
            return
        if version_to_go_on_from(Registry(settings.registry_dir)) is not None:
            say(run("trainer.upgrade", settings, "--reason", reason))
        return
    try:
        require_same_model(settings)
    except ModelMismatch:
        try:
            say(run("trainer.upgrade", settings, "--dry-run"))
        except SpringtideError as unknown:
            # The mismatch is the error to report.
            say(f"what an upgrade would carry over is not known: {unknown}")
        raise


def is_bootstrapped(settings: Settings) -> bool:
    """Returns whether the bootstrap has analysed clicks for the features and the preprocessing of these settings.

    Raises:
        CorruptVersion: The output of the analysis is damaged.
    """
    if not (settings.registry_dir / layout.SPECS).is_dir():
        return False
    spec = FeatureSpec.from_settings(settings).digest
    return Registry(settings.registry_dir).specs.bootstrapped(spec, settings.model) is not None


def has_spec(registry_dir: Path) -> bool:
    """Returns whether a bootstrap has left a feature spec in the registry."""
    return any((registry_dir / layout.SPECS).glob("*/spec.json"))
