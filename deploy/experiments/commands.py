"""The command `springtide experiment`: start, status, rollout, halt, resume, back, promote, stop, report.

`start` links the registry of the experiment's trainer to the versions that it begins with.

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
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from deploy.experiments import status
from deploy.experiments.rollout import as_line, evaluate, roll_out
from deploy.formats import iso
from deploy.operate.control import Say, control_document, current
from deploy.operate.versions import open_registry
from state import layout
from state.config.loading import load
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
from state.experiments.experiment import (
    EVERY_S,
    STEPS,
    By,
    Change,
    Experiment,
    Experiments,
    Origin,
    require_name,
    require_steps,
)
from state.experiments.gate import as_document, as_lines
from state.experiments.past import Past, past_until, write_past
from state.features.spec import FeatureSpec
from state.log import Log
from state.process.environment import actor
from state.registry import control
from state.registry.control import Control
from state.registry.manifest import Manifest
from state.registry.model_fit import differences, going_on_to, upgrade, version_to_go_on_from
from state.registry.registry import Registry

SECTIONS = ("model", "trainer", "guard")
OWN = ("trainer.metrics_port", "trainer.publish_s", "trainer.device")
"""Settings of these sections that an experiment cannot override: they do not affect training, or each trainer has its own."""

COPIED = ("masks", "lifted", "mask_generation", "last_mask", "erased", "training")
"""What an experiment's control copies from the live control: masks, erasures, and whether training is paused.

The generation numbers are those of the live control, because records of the training log name the live generation
that their stream knew.
"""

_TRIES = 3
REGISTRY_GB = 1.0  # of the versions of an experiment


def overrides_of(words: Sequence[str]) -> dict[str, str]:
    """Parses the overrides of an experiment from arguments like `model.hidden=24,8`.

    >>> overrides_of(["model.hidden=24,8"])
    {'model.hidden': '24,8'}

    Raises:
        SettingsError: An argument has another form, or its setting cannot differ from the live trainer's.
    """
    overrides = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise SettingsError(
                f"--set {word}: there is no value", "write SECTION.NAME=VALUE, such as model.hidden=24,8"
            )
        if name.partition(".")[0] not in SECTIONS or name in OWN:
            raise SettingsError(
                f"--set {word}: {name} cannot be tried",
                f"use a setting of {', '.join(SECTIONS)} except {', '.join(OWN)}: rows and their features are those of the "
                "live trainer, and each trainer has its own ports and paths",
            )
        overrides[name] = value
    return overrides


def flags_of(settings: Settings, overrides: Mapping[str, str], registry: Path) -> list[str]:
    """Returns the flags of an experiment's trainer, for a process with the loop's settings in its environment.

    >>> flags_of(Settings(), {"model.dim": "16"}, Path("r"))[:2]
    ['--model.dim=16', '--paths.registry=r']
    """
    settings_of_experiment = {
        "paths.registry": registry,
        "paths.shared_registry": "",
        "trainer.metrics_port": 0,
        # Its workers run on this machine; the addresses are those of the live trainer's.
        "trainer.worker_addresses": "",
        # No host follows these versions, so only durable ones are published; a promotion needs those.
        "trainer.publish_s": settings.registry.durable_s,
        "registry.delta_keep_gb": REGISTRY_GB,
        "export.every_s": 0,
    }
    return [f"--{name}={value}" for name, value in {**overrides, **settings_of_experiment}.items()]


def settings_of(settings: Settings, overrides: Mapping[str, str], registry: Path) -> Settings:
    """Returns the settings of an experiment's trainer.

    Raises:
        SettingsError: A setting is unknown, or its value is invalid.
    """
    return load(flags_of(settings, overrides, registry), settings.environment(), "/dev/null")


def first_control(live: Control, version: int | None, plan: dict[str, Any] | None, by: By) -> Control:
    """Returns the first generation of an experiment's control: its own epoch, from a live version or from scratch.

    Args:
        live: The control of the live trainer.
        version: The version to continue from; None to start from scratch.
        plan: Plan of an upgrade, if the experiment has another model; see `state/registry/model_fit.py`.
        by: Who began it, and why.

    >>> live = control.start(actor="trainer", reason="first start", now_ms=0)
    >>> own = first_control(live, 40, None, By("ann", "see", 5))
    >>> own.generation, own.epoch, own.base, own.action
    (1, 2, 40, 'start')
    """
    first = control.start(actor=by.actor, reason=by.reason, now_ms=by.now_ms)
    first = replace(first, epoch=live.epoch + 1, base=version, log=live.log)
    if plan is not None:
        first = replace(first, action="upgrade", upgraded=True, plan=plan)
    return replace(first, **{name: getattr(live, name) for name in COPIED})


def copied_control(own: Control, live: Control) -> Control:
    """Returns the next generation of an experiment's control; the same one if the live control has nothing new.

    >>> live = control.start(actor="trainer", reason="first start", now_ms=0)
    >>> own = first_control(live, 40, None, By("ann", "see", 5))
    >>> copied_control(own, live) is own
    True
    >>> paused = copied_control(own, control.train(live, False, actor="bob", reason="look", now_ms=6))
    >>> paused.generation, paused.epoch, paused.training, paused.actor
    (2, 2, False, 'bob')
    """
    wanted = {name: getattr(live, name) for name in COPIED}
    if all(getattr(own, name) == value for name, value in wanted.items()):
        return own
    return control.following(own, live.action, live.actor, live.reason, live.created_at_ms, **wanted)


def start(settings: Settings, name: str, origin: Origin, overrides: dict[str, str], by: By) -> tuple[Experiment, str]:
    """Starts an experiment of a valid name; returns it and a description.

    Raises:
        SettingsError: A setting cannot be tried, or `privacy.epsilon` is set.
        RegistryError: Too many experiments run, there was one of this name, or there is nothing to begin it from.
    """
    live, experiments = open_registry(settings), Experiments(settings)
    if settings.privacy.epsilon:
        raise SettingsError(
            "privacy.epsilon is set: two trainers would draw the same noise, and comparing them would remove it",
            "try other settings on a deployment without a budget",
        )
    live_control = current(live)
    tried = settings_of(settings, overrides, experiments.registry(name))
    newest = version_to_go_on_from(live)
    version = newest if origin == "live" else None
    past = past_until(newest, tried.retrain) if origin == "clicks" else None
    if origin == "live" and version is None:
        raise RegistryError(
            f"{live.path}: there is no version to begin an experiment from",
            "wait for the trainer's first version (`springtide versions`), or begin with --from nothing",
        )
    experiment = Experiment(
        name=name,
        stage="shadow",
        origin=origin,
        version=None if version is None else version.version,
        epoch=live_control.epoch,
        overrides=overrides,
        history=(Change(by.now_ms, "shadow", None, 0.0, by.actor, by.reason),),
    )
    experiments.sweep()
    experiments.add(experiment, _filler(live, live_control, version, tried, past, by))
    begins = "nothing" if version is None else f"version {version.version}"
    if past is not None:
        begins = f"clicks since {iso(past.begin_ms)}"
    differs = ", ".join(f"{name} {value}" for name, value in overrides.items()) or "no other settings"
    return experiment, (
        f"experiment {experiment.name} begins from {begins} with {differs}; `springtide experiment status` compares it"
    )


def _filler(
    live: Registry, live_control: Control, version: Manifest | None, tried: Settings, past: Past | None, by: By
) -> Callable[[Path], None]:
    """Returns a function that fills the directory of an experiment's registry.

    Raises:
        SettingsError: Clicks were not analysed for its preprocessing.
    """
    spec = FeatureSpec.from_settings(tried)
    analysis = live.specs.bootstrapped(spec.digest, tried.model)
    if analysis is None:
        raise SettingsError(
            f"clicks were not analysed for the preprocessing {tried.model.preprocessing} with its options",
            "run `springtide bootstrap` with these settings of [model] first, then repeat the command",
        )
    plan = None
    if version is not None and differences(live, version, tried, spec):
        plan = {**going_on_to(tried, spec.digest), "was": version.spec}

    def fill(folder: Path) -> None:
        own, specs = Registry(folder), folder / layout.SPECS / analysis
        shutil.copytree(live.path / layout.SPECS / analysis, specs, copy_function=_link, dirs_exist_ok=True)
        if version is not None:
            _link_version(live, own, version.version)
            # Hosts that answer for the experiment begin with it.
            with suppress(CorruptVersion):
                own.specs.add_program(live.specs.program(version.program))
        if past is not None:
            write_past(folder, past)
        own.propose(first_control(live_control, None if version is None else version.version, plan, by))

    return fill


def _link_version(live: Registry, own: Registry, version: int) -> None:
    """Links all files that a version consists of; the compactor may replace them with a merged delta meanwhile."""
    for tries_left in reversed(range(_TRIES)):
        base, deltas = live.chain(version)
        try:
            for part in (base, *deltas):
                for name in part.files:
                    # Fetch a file that is not on this host yet.
                    live.path_of(part, name)
                shutil.copytree(live.folder_of(part), own.folder_of(part), copy_function=_link, dirs_exist_ok=True)
            own.chain(version)
            return
        except (OSError, shutil.Error, UnknownVersion, CorruptVersion):
            if not tries_left:
                raise


def _link(source: str, target: str) -> None:
    if Path(target).exists():
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


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
            steps = percentages(args.steps) if args.steps else STEPS
            roll_out(settings, name, steps, args.every or EVERY_S, by, say)
            return
        document, text = _result(settings, args, by)
    except OSError as error:
        raise of_disk(error) from error
    say(json.dumps(document, indent=2) if args.output == "json" else text)


def percentages(text: str) -> tuple[float, ...]:
    """Parses the steps of a rollout.

    >>> percentages("1,50,100")
    (1.0, 50.0, 100.0)

    Raises:
        SettingsError: They are no ascending percentages.
    """
    try:
        steps = tuple(float(share) for share in text.split(","))
    except ValueError:
        raise SettingsError(f"--steps {text} are no steps", "give ascending percentages such as 1,5,50,100") from None
    require_steps(steps)
    return steps


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
