"""The settings of a trial's trainer: the loop's, except for the trial's overrides, and its own paths and ports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from state.config.loading import load
from state.config.settings import Settings
from state.errors import SettingsError

SECTIONS = ("model", "trainer", "guard")
OWN = ("trainer.metrics_port", "trainer.partition", "trainer.publish_s", "trainer.device")
"""Settings of these sections that a trial cannot override: they do not affect training, or each trial has its own."""


def overrides_of(words: Sequence[str]) -> dict[str, str]:
    """Parses the overrides of a trial from arguments like `model.hidden=24,8`.

    >>> overrides_of(["model.hidden=24,8"])
    {'model.hidden': '24,8'}

    Raises:
        SettingsError: An argument has another form, or its setting cannot differ from the live trainer's.
    """
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise SettingsError(
                f"--set {word}: there is no value", "write SECTION.NAME=VALUE, such as model.hidden=24,8"
            )
        if name.partition(".")[0] not in SECTIONS or name in OWN:
            raise SettingsError(
                f"--set {word}: {name} cannot be tried",
                f"take a setting of {', '.join(SECTIONS)} but {', '.join(OWN)}: rows and their features are those of the "
                "live trainer, and ports and places are the trial's own",
            )
        found[name] = value
    return found


def flags_of(settings: Settings, overrides: Mapping[str, str], registry: Path) -> list[str]:
    """Returns the flags of a trial's trainer, for a process with the loop's settings in its environment.

    Args:
        settings: Settings of the loop.
        overrides: Overrides of the trial.
        registry: The trial's registry.

    >>> flags_of(Settings(), {"model.dim": "16"}, Path("r"))[:2]
    ['--model.dim=16', '--paths.registry=r']
    """
    own = {
        "paths.registry": registry,
        "paths.shared_registry": "",
        "trainer.metrics_port": 0,
        # No host follows these versions, so only durable ones are published; a promotion needs those.
        "trainer.publish_s": settings.registry.durable_s,
        "registry.delta_keep_gb": settings.trials.registry_gb,
        "export.every_s": 0,
    }
    return [f"--{name}={value}" for name, value in {**overrides, **own}.items()]


def settings_of(settings: Settings, overrides: Mapping[str, str], registry: Path) -> Settings:
    """Returns the settings of a trial's trainer.

    Raises:
        SettingsError: A setting is unknown, or its value is invalid.
    """
    return load(flags_of(settings, overrides, registry), settings.environment(), "/dev/null")


def not_taken(settings: Settings, tried: Settings, overrides: Mapping[str, str]) -> list[str]:
    """Returns the overrides of a trial that differ from the loop's settings, as flags.

    >>> from dataclasses import replace
    >>> tried = replace(Settings(), model=replace(Settings().model, dim=16))
    >>> not_taken(Settings(), tried, {"model.dim": "16"}), not_taken(tried, tried, {"model.dim": "16"})
    (['--model.dim 16'], [])
    """
    return [f"--{name} {value}" for name, value in overrides.items() if settings.value(name) != tried.value(name)]
