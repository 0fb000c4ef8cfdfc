"""`springtide trial promote`: the live trainer goes on, in a new epoch, from what a trial learned.

1. The settings must be those that the trial tried; where the live version is of another model, the live trainer must rest.
2. `promoting` is wanted: the trial's trainer ends, with a last durable version.
3. The next control generation begins an epoch from the live version, whose first version is what the trial learned.
4. `promoted` is written down; the trial's registry goes once that version is there.

A crash before 3 leaves the trial `promoting`: the same command goes on. The live
line stays as it is, so that `springtide rollback` takes it back.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from deploy.operate.commands import Say, control_document, current
from deploy.operate.versions import open_registry
from deploy.trials.trial_settings import not_taken, settings_of
from state import layout
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import ControlConflict, LockHeld, RegistryError, SettingsError
from state.features.spec import FeatureSpec
from state.process.actor import actor
from state.registry.control import Control
from state.registry.manifest import Manifest
from state.registry.model_fit import differences, version_to_go_on_from
from state.registry.registry import Registry
from state.registry.sealed import as_values
from state.registry.upgrades import going_on_to, upgrade
from state.trials.trial import Trial, Trials, Wanted

WAIT_S = 60.0
LOOK_S = 0.1
PROMOTING: Wanted = "promoting"


def promote(settings: Settings, asked: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Promotes one trial.

    Raises:
        SettingsError: The settings are not those of the trial; the message says which.
        RegistryError: It runs no longer, or learned nothing yet.
        LockHeld: The live trainer runs with another model, or the trial's does not end.
        ControlConflict: The live trainer went on elsewhere meanwhile.
    """
    live, trials = open_registry(settings), Trials(settings.state_dir)
    trial = trials.read(asked.name)
    if trial.wanted not in ("running", PROMOTING):
        raise RegistryError(
            f"trial {trial.name} is {trial.wanted}: what it learned is gone",
            "start another one, and promote it while it runs",
        )
    # 1.
    tried = settings_of(settings, trial.overrides, trials.registry(trial.name))
    if missing := not_taken(settings, tried, trial.overrides):
        raise SettingsError(
            f"trial {trial.name} tries settings that these are not: {', '.join(missing)}",
            f"put them into springtide.toml, or behind this command and each start: {' '.join(missing)}",
        )
    newest = version_to_go_on_from(live)
    if newest is None:
        raise RegistryError(f"{live.path} has no version", "look at `springtide status`")
    same = not differences(live, newest, tried, FeatureSpec.from_settings(tried))
    with nullcontext() if same else _resting(live, trial):
        # 2.
        who: dict[str, Any] = {"actor": actor(), "reason": asked.reason, "now_ms": now_ms}
        trials.change(trial.name, lambda now: now.wants(PROMOTING, **who))
        with _its_trainer_ended(trials, trial):
            own = Registry(trials.registry(trial.name))
            # 3.
            try:
                made = _propose(live, own, trial, tried, who)
            except RegistryError:
                trials.change(trial.name, lambda now: now.wants("running", **who))
                raise
            # 4.
            done = trials.change(trial.name, lambda now: now.wants("promoted", **who, promoted_epoch=made.epoch))
    if asked.output == "json":
        say(json.dumps({"trial": as_values(done), "control": control_document(made)}, indent=2))
        return
    say(
        f"generation {made.generation}: epoch {made.epoch} begins from what trial {trial.name} learned; "
        f"`springtide rollback --to {made.base} --reason TEXT` takes it back"
    )


@contextmanager
def _resting(live: Registry, trial: Trial) -> Iterator[None]:
    """Holds the live trainer's lock: one that runs with another model could not go on from the trial."""
    try:
        with DirectoryLock(live.path, layout.TRAINER_LOCK):
            yield
    except LockHeld as held:
        raise LockHeld(
            f"trial {trial.name} has another model than the live trainer, which runs: {held.what}",
            "stop `springtide up`, give this command again, and start `springtide up` with the trial's settings",
        ) from held


@contextmanager
def _its_trainer_ended(trials: Trials, trial: Trial) -> Iterator[None]:
    """Waits until the trial's trainer ended, and keeps others from starting."""
    lock, end_s = DirectoryLock(trials.registry(trial.name), layout.TRAINER_LOCK), time.monotonic() + WAIT_S
    while True:
        try:
            lock.acquire()
            break
        except LockHeld:
            if time.monotonic() >= end_s:
                raise
            time.sleep(LOOK_S)
    try:
        yield
    finally:
        lock.release()


def _propose(live: Registry, own: Registry, trial: Trial, tried: Settings, who: dict[str, Any]) -> Control:
    """The live control's next generation, which begins the epoch; durable when this returns."""
    version = _learned(own, trial)
    plan = {
        **going_on_to(tried, version.spec),
        "was": version.spec,
        "trial": trial.name,
        "version": version.version,
    }

    def decided(control: Control) -> Control:
        newest = version_to_go_on_from(live)
        if control.held is not None:
            raise RegistryError(
                "the guard holds training, and what it holds comes first",
                "look at `springtide status`: `springtide resume`, or go back",
            )
        if control.epoch != trial.epoch or newest is None:
            raise ControlConflict(
                f"the live trainer went on in epoch {control.epoch}: {control.action} by {control.actor}",
                "start another trial, from what is live now",
            )
        return upgrade(control, newest.version, plan, **who)

    current(live)
    return live.change(decided)


def _learned(own: Registry, trial: Trial) -> Manifest:
    control = own.control()
    number = None if control is None else own.newest(control.epoch)
    if number is None:
        raise RegistryError(
            f"trial {trial.name} has no version of its own yet",
            "wait for one: `springtide trial list`, then promote it again",
        )
    own.chain(number)
    return own.manifest(number)
