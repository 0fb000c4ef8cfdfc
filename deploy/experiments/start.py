"""`springtide experiment start`: the settings of an experiment's trainer, and the registry that it begins with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from deploy.formats import iso
from deploy.operate.control import current
from deploy.operate.versions import open_registry
from state import layout
from state.config.loading import load
from state.config.settings import Settings
from state.errors import CorruptVersion, RegistryError, SettingsError, UnknownVersion
from state.experiments.experiment import By, Change, Experiment, Experiments, Origin
from state.experiments.past import Past, past_until, write_past
from state.features.spec import FeatureSpec
from state.registry import control
from state.registry.control import Control
from state.registry.manifest import Manifest
from state.registry.model_fit import differences, going_on_to, version_to_go_on_from
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
