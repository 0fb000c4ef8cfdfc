"""Upgrades at `springtide up`, when the registry was trained with other settings.

It reports what an upgrade would carry over, and upgrades only on request. A change of the release needs no request:
the trainer handles it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from deploy.startup.own_model import run
from state import layout
from state.config.settings import Settings
from state.errors import ModelMismatch, SettingsError, SpringtideError
from state.features.spec import FeatureSpec
from state.registry.model_fit import require_same_model, version_to_go_on_from
from state.registry.registry import Registry

MODULE = "trainer.upgrade"


def take_upgrade(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Removes `--upgrade` from a command line; returns its reason (None if it is absent) and the rest.

    The rest keeps `--reason TEXT`, because it can also be the reason of an accepted loss.

    >>> take_upgrade(["--upgrade", "--reason", "wider rows", "--model.dim", "64"])
    ('wider rows', ['--reason', 'wider rows', '--model.dim', '64'])
    >>> take_upgrade(["--model.dim", "64"])
    (None, ['--model.dim', '64'])

    Raises:
        SettingsError: There is no reason.
    """
    if "--upgrade" not in words:
        return None, list(words)
    rest = [word for word in words if word != "--upgrade"]
    reasons = [after for word, after in itertools.pairwise(rest) if word == "--reason"]
    reasons += [word.removeprefix("--reason=") for word in rest if word.startswith("--reason=")]
    if not reasons or not reasons[0].strip():
        raise SettingsError("--upgrade needs --reason TEXT: an upgrade is decided by somebody, for a reason")
    return reasons[0], rest


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
            say(run(MODULE, settings, "--reason", reason))
        return
    try:
        require_same_model(settings)
    except ModelMismatch:
        try:
            say(run(MODULE, settings, "--dry-run"))
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
