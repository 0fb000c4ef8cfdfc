"""`springtide trial start|list|stop|promote|report`: what is wanted of trials; the process of `springtide up` converges to it."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from typing import Any

from deploy.operate.commands import Say, current
from deploy.operate.times import iso
from deploy.operate.versions import open_registry
from deploy.rollouts.reporting import say_report
from deploy.trials import retrain_told, telling
from deploy.trials.promoting import promote
from deploy.trials.starting import filler, version_for
from deploy.trials.trial_settings import overrides_of, settings_of
from state.config.settings import Settings
from state.errors import RegistryError, SettingsError, of_disk
from state.log import KafkaLog
from state.process.actor import actor
from state.registry.model_fit import version_to_go_on_from
from state.registry.sealed import as_values
from state.trials.past import past_until
from state.trials.trial import MOST_RUNNING, Trial, Trials, require_name


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
    # What the client says of each try is said once by what failed.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    say_report(settings, asked.name, asked.output, KafkaLog(settings.kafka), say)


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
