"""The command `springtide experiment`: start, status, rollout, halt, resume, back, promote, stop, report.

`promote` lets the live trainer continue, in a new epoch, from what an experiment learned:

1. Check that the settings are those of the experiment. If the live version is of another model, the live trainer must be
   stopped.
2. Set the stage to `promoting`: the experiment's trainer ends with a last durable version.
3. Create the next control generation. It begins an epoch from the live version, whose first version is what the
   experiment learned.
4. Record `promoted`. The experiment's registry is removed once that first version exists.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import msgspec

from deploy.experiments import status
from deploy.experiments.rollout import as_line, evaluate, roll_out
from deploy.experiments.start import overrides_of, settings_of, start
from deploy.operate.control import Say, control_document, current
from deploy.operate.versions import open_registry
from state import layout
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import ControlConflict, LockHeld, RegistryError, SettingsError, of_disk
from state.experiments.experiment import EVERY_S, STEPS, By, Experiment, Experiments, require_name
from state.experiments.gate import as_document, as_lines
from state.features.spec import FeatureSpec
from state.log import Log
from state.process.actor import actor
from state.registry.control import Control
from state.registry.manifest import Manifest
from state.registry.model_fit import differences, going_on_to, upgrade, version_to_go_on_from
from state.registry.registry import Registry

WAIT_S = 60.0
"""How long a promotion waits for the experiment's trainer to end."""

REASONED = ("start", "promote", "stop")
"""Verbs that require a reason."""

CHANGES: dict[str, Callable[[Experiment, By], Experiment]] = {
    "halt": Experiment.halt,
    "resume": Experiment.resume,
    "back": Experiment.back,
}


def experiment(settings: Settings, args: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Runs one command about experiments."""
    verb, name = args.what, args.name
    if verb != "status" and (not name or (verb in REASONED and not args.reason.strip())):
        raise SettingsError(
            f"experiment {verb} needs a name{' and --reason TEXT' if verb in REASONED else ''}",
            "see `springtide experiment --help`",
        )
    for option, value, owner in (
        ("--set", args.set, "start"),
        ("--from", args.origin, "start"),
        ("--steps", args.steps, "rollout"),
        ("--every", args.every, "rollout"),
    ):
        if value and verb != owner:
            raise SettingsError(f"{option} is for experiment {owner}", "see `springtide experiment --help`")
    by = By(actor(), args.reason or "none given", now_ms)
    # Each failure is reported once; the Kafka client would log every attempt.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    try:
        if verb == "rollout":
            roll_out(settings, name, args.steps or STEPS, args.every or EVERY_S, by, say)
            return
        document, text = _result(settings, args, by)
    except OSError as error:
        raise of_disk(error) from error
    say(json.dumps(document, indent=2) if args.output == "json" else text)


def _result(settings: Settings, args: argparse.Namespace, by: By) -> tuple[Any, str]:
    verb, name, experiments = args.what, args.name, Experiments(settings)
    if verb == "status":
        listed = [experiment for experiment in status.listed(settings, by.now_ms) if name in ("", experiment["name"])]
        lines = status.as_lines(listed)
        if (retrain := status.retrain_status(settings, by.now_ms)) is not None:
            lines.append("retrain: " + ", ".join(status.retrain_as_text(retrain)))
        return listed, "\n".join(lines)
    if verb == "report":
        newest = experiments.get(name)
        report = evaluate(settings, newest, Log(settings.kafka))
        return as_document(report, newest), "\n".join(as_lines(report, newest))
    if verb == "start":
        require_name(name)
        changed, text = start(settings, name, args.origin or "live", overrides_of(args.set), by)
    elif verb == "promote":
        changed, control = promote(settings, name, by)
        document = {"experiment": msgspec.to_builtins(changed), "control": control_document(control)}
        return document, (
            f"generation {control.generation}: epoch {control.epoch} begins from what experiment {name} learned; "
            f"`springtide rollback --to {control.base} --reason TEXT` undoes it"
        )
    elif verb == "stop":
        changed = experiments.change(name, lambda now: now.stop(by))
        text = f"experiment {name} is {changed.stage}; its weights are removed and its comparison is kept"
    else:
        changed = experiments.change(name, lambda now: CHANGES[verb](now, by))
        text = as_line(changed)
    return msgspec.to_builtins(changed), text


def promote(settings: Settings, name: str, by: By) -> tuple[Experiment, Control]:
    """Promotes an experiment; returns it and the control generation that begins the epoch.

    Raises:
        SettingsError: The settings differ from those of the experiment; the message says which.
        RegistryError: It does not run, or learned nothing yet.
        LockHeld: The live trainer runs with another model, or the experiment's trainer does not end.
        ControlConflict: The live trainer continued elsewhere meanwhile.
    """
    live, experiments = open_registry(settings), Experiments(settings)
    experiment = experiments.get(name)
    # First of all, refuse an experiment that has ended.
    experiment.promote(by)
    # 1.
    tried = settings_of(settings, experiment.overrides, experiments.registry(name))
    missing = [
        f"--{key} {value}" for key, value in experiment.overrides.items() if settings.value(key) != tried.value(key)
    ]
    if missing:
        raise SettingsError(
            f"experiment {name} tries settings that these are not: {', '.join(missing)}",
            f"put them into springtide.toml, or add them to this command and each start: {' '.join(missing)}",
        )
    newest = version_to_go_on_from(live)
    if newest is None:
        raise RegistryError(f"{live.path} has no version", "look at `springtide status`")
    same = not differences(live, newest, tried, FeatureSpec.from_settings(tried))
    with nullcontext() if same else _live_trainer_stopped(live, name):
        # 2.
        experiments.change(name, lambda now: now.promote(by))
        # Wait until its trainer has ended, and prevent another one from starting.
        with DirectoryLock(experiments.registry(name), layout.TRAINER_LOCK).acquire(wait_s=WAIT_S):
            own = Registry(experiments.registry(name))
            # 3.
            try:
                control = _propose(live, own, experiment, tried, by)
            except RegistryError:
                experiments.change(name, lambda now: now.cancel_promotion(by))
                raise
            # 4.
            return experiments.change(name, lambda now: now.promoted(control.epoch, by)), control


@contextmanager
def _live_trainer_stopped(live: Registry, name: str) -> Iterator[None]:
    """Holds the live trainer's lock: a running trainer with another model could not continue from the experiment."""
    try:
        with DirectoryLock(live.path, layout.TRAINER_LOCK):
            yield
    except LockHeld as error:
        raise LockHeld(
            f"experiment {name} has another model than the live trainer, which runs: {error.what}",
            "stop `springtide up`, give this command again, and start `springtide up` with the experiment's settings",
        ) from error


def _propose(live: Registry, own: Registry, experiment: Experiment, tried: Settings, by: By) -> Control:
    """Creates the live control's next generation, which begins the epoch; durable when this returns."""
    version = _learned(own, experiment.name)
    plan = {
        **going_on_to(tried, version.spec),
        "was": version.spec,
        "experiment": experiment.name,
        "version": version.version,
    }

    def decided(control: Control) -> Control:
        newest = version_to_go_on_from(live)
        if control.held is not None:
            raise RegistryError(
                "the guard holds training, which must be decided first",
                "look at `springtide status`: `springtide resume`, or roll back",
            )
        if control.epoch != experiment.epoch or newest is None:
            raise ControlConflict(
                f"the live trainer continued in epoch {control.epoch}: {control.action} by {control.actor}",
                "start another experiment from the live version",
            )
        return upgrade(control, newest.version, plan, **by._asdict())

    current(live)
    return live.change(decided)


def _learned(own: Registry, name: str) -> Manifest:
    control = own.control()
    number = None if control is None else own.newest(control.epoch)
    if number is None:
        raise RegistryError(
            f"experiment {name} has no version of its own yet",
            "wait for one: `springtide experiment status`, then promote it again",
        )
    own.chain(number)
    return own.manifest(number)
