"""Gives a trial a registry of its own: the live version as links to its files, the feature spec, and a first control.

Files of versions are never changed, only replaced by others of their name: a
link costs no room, and outlives what the live compactor removes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from state import layout
from state.config.settings import Settings
from state.errors import CorruptVersion, RegistryError, SettingsError, UnknownVersion
from state.features.spec import FeatureSpec
from state.registry.control import Control
from state.registry.manifest import Manifest
from state.registry.model_fit import differences, version_to_go_on_from
from state.registry.registry import Registry
from state.registry.upgrades import going_on_to
from state.trials.following import begun
from state.trials.past import Past, write_past
from state.trials.trial import Trial

_TRIES = 3


def require_bootstrapped(live: Registry, tried: Settings) -> str:
    """The name of the analysis of clicks that the trial's preprocessing needs.

    Raises:
        SettingsError: There is none.
    """
    name = live.bootstrapped(FeatureSpec.from_settings(tried).digest, tried.model)
    if name is None:
        raise SettingsError(
            f"clicks were not analysed for the preprocessing {tried.model.preprocessing} with its options",
            "run `springtide bootstrap` with these settings of [model] first, then repeat the command",
        )
    return name


def version_for(live: Registry, origin: str) -> Manifest | None:
    """The version that a trial begins from; None for nothing, and for past clicks.

    Raises:
        RegistryError: Nothing was learned yet.
    """
    if origin != "live":
        return None
    found = version_to_go_on_from(live)
    if found is None:
        raise RegistryError(
            f"{live.path}: there is no version to begin a trial from",
            "wait for the trainer's first version (`springtide versions`), or begin with --from nothing",
        )
    return found


def plan_of(live: Registry, version: Manifest | None, tried: Settings) -> dict[str, Any] | None:
    """What an upgrade within the trial goes on to, where its model is another one; None where it is the version's own."""
    spec = FeatureSpec.from_settings(tried)
    if version is None or not differences(live, version, tried, spec):
        return None
    return {**going_on_to(tried, spec.digest), "was": version.spec}


def filler(
    live: Registry, control: Control, version: Manifest | None, tried: Settings, trial: Trial, past: Past | None = None
) -> Callable[[Path], None]:
    """Fills the directory of a trial's registry.

    Args:
        live: The registry of the live trainer.
        control: Its control.
        version: To begin from; None for nothing.
        tried: The trial's settings.
        trial: Who begins it, and why.
        past: What its trainer learns first; None for nothing.
    """
    spec, plan = require_bootstrapped(live, tried), plan_of(live, version, tried)

    def fill(folder: Path) -> None:
        own = Registry(folder)
        shutil.copytree(
            live.path / layout.SPECS / spec, folder / layout.SPECS / spec, copy_function=_linked, dirs_exist_ok=True
        )
        if version is not None:
            _link_version(live, own, version.version)
            # Whoever answers for the trial begins with it.
            with suppress(CorruptVersion):
                own.add_program(live.program(version.program))
        if past is not None:
            write_past(folder, past)
        base = None if version is None else version.version
        who: dict[str, Any] = {"actor": trial.begun_by, "reason": trial.begun_for, "now_ms": trial.begun_at_ms}
        own.propose(begun(control, base, plan, **who))

    return fill


def _link_version(live: Registry, own: Registry, version: int) -> None:
    """Links all that a version is made from; the compactor may put a merged delta in place of others meanwhile."""
    for left in reversed(range(_TRIES)):
        base, deltas = live.chain(version)
        try:
            for part in (base, *deltas):
                for name in part.files:
                    # One that is not here yet is brought.
                    live.path_of(part, name)
                shutil.copytree(live.folder_of(part), own.folder_of(part), copy_function=_linked, dirs_exist_ok=True)
            own.chain(version)
            return
        except (OSError, shutil.Error, UnknownVersion, CorruptVersion):
            if not left:
                raise


def _linked(source: str, target: str) -> None:
    """Links a file, or copies it onto another disk."""
    if Path(target).exists():
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
