"""The settings of a trial's trainer: those of the loop, but for what the trial tries and what must be its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from state.config.loading import load
from state.config.settings import Settings
from state.errors import SettingsError

SECTIONS = ("model", "trainer", "guard")
OWN = ("trainer.metrics_port", "trainer.partition", "trainer.publish_s", "trainer.device")
"""Of these sections; they are no matter of what is learned, or the trial's own."""


def overrides_of(words: Sequence[str]) -> dict[str, str]:
    """The settings that a trial tries, of words like `model.hidden=24,8`.

    >>> overrides_of(["model.hidden=24,8"])
    {'model.hidden': '24,8'}

    Raises:
        SettingsError: One is written otherwise, or cannot be tried beside the live trainer.
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
    """The flags of a trial's trainer, for a process that has the loop's settings in its environment.

    Args:
        settings: Of the loop.
        overrides: Of the trial.
        registry: Its own.

    >>> flags_of(Settings(), {"model.dim": "16"}, Path("r"))[:2]
    ['--model.dim=16', '--paths.registry=r']
    """
    own = {
        "paths.registry": registry,
        "paths.shared_registry": "",
        "trainer.metrics_port": 0,
        # Nobody follows its versions: only those that one can take over are made.
        "trainer.publish_s": settings.registry.durable_s,
        "registry.delta_keep_gb": settings.trials.registry_gb,
        "export.every_s": 0,
    }
    return [f"--{name}={value}" for name, value in {**overrides, **own}.items()]


def settings_of(settings: Settings, overrides: Mapping[str, str], registry: Path) -> Settings:
    """The settings of a trial's trainer.

    Raises:
        SettingsError: A setting is unknown, or its value impossible.
    """
    return load(flags_of(settings, overrides, registry), settings.environment(), "/dev/null")


def not_taken(settings: Settings, tried: Settings, overrides: Mapping[str, str]) -> list[str]:
    """The overrides of a trial that the loop's settings do not have, as settings are written in flags.

    >>> from dataclasses import replace
    >>> tried = replace(Settings(), model=replace(Settings().model, dim=16))
    >>> not_taken(Settings(), tried, {"model.dim": "16"}), not_taken(tried, tried, {"model.dim": "16"})
    (['--model.dim 16'], [])
    """
    return [f"--{name} {value}" for name, value in overrides.items() if settings.value(name) != tried.value(name)]
