"""The commands `springtide trial start|list|stop|promote|report`.

A command writes the wanted state of a trial; the trials' process of `springtide up` converges to
it.

`start` gives a trial its own registry: the live version as links to its files, the feature spec,
and a first control. Files of versions are never modified, only replaced under the same name. So a
link uses no space, and stays valid when the live compactor removes the file.

`promote` lets the live trainer continue, in a new epoch, from what the trial learned:

1. Check that the settings are those of the trial. If the live version is of another model, the live
   trainer must be stopped.
2. Set the wanted state to `promoting`: the trial's trainer ends with a last durable version.
3. Create the next control generation. It begins an epoch from the live version, whose first version
   is what the trial learned.
4. Record `promoted`. The trial's registry is removed once that first version exists.

After a crash before step 3 the trial stays `promoting`, and the same command continues. The live
branch is kept, so that `springtide rollback` can undo the promotion.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from deploy.operate.commands import Say, control_document, current
from deploy.operate.times import iso
from deploy.operate.versions import open_registry
from deploy.rollouts.reporting import say_report
from deploy.trials import retrain_told, telling
from deploy.trials.trial_settings import not_taken, overrides_of, settings_of
from state import layout
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import (
    ControlConflict,
    CorruptVersion,
    LockHeld,
    RegistryError,
    SettingsError,
    UnknownVersion,
    of_disk,
)
from state.features.spec import FeatureSpec
from state.log import Log
from state.process.actor import actor
from state.registry.control import Control
from state.registry.manifest import Manifest
from state.registry.model_fit import differences, version_to_go_on_from
from state.registry.registry import Registry
from state.registry.sealed import as_values
from state.registry.upgrades import going_on_to, upgrade
from state.trials.following import begun
from state.trials.past import Past, past_until, write_past
from state.trials.trial import MOST_RUNNING, Trial, Trials, Wanted, require_name

WAIT_S = 60.0
LOOK_S = 0.1
PROMOTING: Wanted = "promoting"
_TRIES = 3


def promote(settings: Settings, asked: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Promotes one trial.

    Raises:
        SettingsError: The settings differ from those of the trial; the message says which.
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
    """Holds the live trainer's lock: a running trainer with another model could not continue from the trial."""
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


def require_bootstrapped(live: Registry, tried: Settings) -> str:
    """The name of the analysis of clicks that the trial's preprocessing needs.

    Raises:
        SettingsError: There is none.
    """
    name = live.specs.bootstrapped(FeatureSpec.from_settings(tried).digest, tried.model)
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
    """The model to which an upgrade within the trial changes; None if it is the version's own."""
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
                own.specs.add_program(live.specs.program(version.program))
        if past is not None:
            write_past(folder, past)
        base = None if version is None else version.version
        who: dict[str, Any] = {"actor": trial.begun_by, "reason": trial.begun_for, "now_ms": trial.begun_at_ms}
        own.propose(begun(control, base, plan, **who))

    return fill


def _link_version(live: Registry, own: Registry, version: int) -> None:
    """Links all files that a version consists of; the compactor may replace them with a merged delta meanwhile."""
    for left in reversed(range(_TRIES)):
        base, deltas = live.chain(version)
        try:
            for part in (base, *deltas):
                for name in part.files:
                    # Fetch a file that is not on this host yet.
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


def trial(settings: Settings, asked: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Does one command about trials.

    Raises:
        SettingsError: A word is missing, or a setting cannot be tried.
        RegistryError: There is no such trial, or nothing to begin it from.
        SpringtideError: The registry or the trial's directory cannot be used.
    """
    if asked.what == "list":
        _list(settings, asked, now_ms, say)
        return
    if asked.what == "report":
        _report(settings, asked, say)
        return
    if not asked.name or not asked.reason.strip():
        raise SettingsError(f"trial {asked.what} needs a name and --reason TEXT", "see `springtide trial --help`")
    if asked.what != "start" and (asked.set or asked.origin != "live"):
        raise SettingsError(
            "--set and --from are for trial start", "a trial that runs is not changed: start another one"
        )
    require_name(asked.name)
    verbs: dict[str, Callable[[Settings, argparse.Namespace, int, Say], None]] = {
        "start": _start,
        "stop": _stop,
        "promote": promote,
    }
    try:
        verbs[asked.what](settings, asked, now_ms, say)
    except OSError as error:
        raise of_disk(error) from error


def _list(settings: Settings, asked: argparse.Namespace, now_ms: int, say: Say) -> None:
    found = telling.look(settings)
    if asked.output == "json":
        say(json.dumps(found, indent=2))
        return
    say(telling.as_table(found))
    if told := retrain_told.look(settings, now_ms):
        say("retrain: " + ", ".join(retrain_told.as_text(told)))


def _report(settings: Settings, asked: argparse.Namespace, say: Say) -> None:
    """How the arms of the trial's newest rollout compare."""
    if not asked.name:
        raise SettingsError("trial report needs a name", "see `springtide trial list`")
    # A failed attempt is reported once, with what failed; the client's own messages would repeat it.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    say_report(settings, asked.name, asked.output, Log(settings.kafka), say)


def _start(settings: Settings, asked: argparse.Namespace, now_ms: int, say: Say) -> None:
    live, trials = open_registry(settings), Trials(settings.state_dir)
    running = [one.name for one in trials.all() if one.runs]
    if len(running) >= MOST_RUNNING:
        raise RegistryError(f"{len(running)} trials run already: {', '.join(running)}", "stop one of them first")
    if settings.privacy.epsilon:
        raise SettingsError(
            "privacy.epsilon is set: two trainers would take the same noise, and who compares them is rid of it",
            "try other settings on a deployment without a budget",
        )
    control, overrides = current(live), overrides_of(asked.set)
    tried = settings_of(settings, overrides, trials.registry(asked.name))
    version = version_for(live, asked.origin)
    past = past_until(version_to_go_on_from(live), tried.retrain) if asked.origin == "clicks" else None
    made = Trial(
        name=asked.name,
        wanted="running",
        actor=actor(),
        reason=asked.reason,
        at_ms=now_ms,
        begun_by=actor(),
        begun_for=asked.reason,
        begun_at_ms=now_ms,
        origin=asked.origin,
        version=None if version is None else version.version,
        epoch=control.epoch,
        overrides=overrides,
    )
    trials.sweep()
    trials.add(made, filler(live, control, version, tried, made, past))
    begins = "nothing" if version is None else f"version {version.version}"
    if past is not None:
        begins = f"clicks since {iso(past.begin_ms)}"
    differs = ", ".join(f"{name} {value}" for name, value in overrides.items()) or "no other settings"
    _told(made, f"trial {made.name} begins from {begins} with {differs}; `springtide trial list` compares", asked, say)


def _stop(settings: Settings, asked: argparse.Namespace, now_ms: int, say: Say) -> None:
    trials = Trials(settings.state_dir)
    wanted: dict[str, Any] = {"actor": actor(), "reason": asked.reason, "now_ms": now_ms}

    def stopped(trial: Trial) -> Trial:
        if trial.wanted == "promoted":
            raise RegistryError(
                f"trial {trial.name} is promoted: the live trainer goes on from it",
                "to take that back: `springtide rollback --to V --reason TEXT`",
            )
        return trial if trial.wanted in ("stopped", "ended") else trial.wants("stopped", **wanted)

    made = trials.change(asked.name, stopped)
    _told(made, f"trial {made.name} is {made.wanted}; what it learned is removed, its comparison stays", asked, say)


def _told(made: Trial, done: str, asked: argparse.Namespace, say: Say) -> None:
    say(json.dumps(as_values(made), indent=2) if asked.output == "json" else done)
