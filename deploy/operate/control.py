"""The operator's commands on control: pin and follow, label, hold and release, pause and resume, unmask.

A command only writes the next control generation; serving, trainer and stream read it and converge. A repeated
command changes nothing.
"""

from __future__ import annotations

import argparse
from typing import Any

from deploy.operate.commands import Say, current, put
from deploy.operate.versions import open_registry
from state.config.settings import Settings
from state.errors import SettingsError
from state.process.actor import actor
from state.registry import control as transitions


def pin(settings: Settings, asked: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Pins serving to one version; training continues.

    Raises:
        UnknownVersion: The version is not kept, or its parts are not all available any more.
        ControlConflict: Another client changed control in the meantime.
    """
    registry = open_registry(settings)
    registry.chain(asked.version)
    control = current(registry, asked.if_generation)
    new = transitions.pin(control, asked.version, actor=actor(), reason=asked.reason, now_ms=now_ms)
    put(registry, control, new, f"answers stay at version {asked.version}", asked, say)


def label(settings: Settings, asked: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Sets a label on a version, or removes the label.

    Raises:
        SettingsError: Neither a version nor `--remove` is given, or both are.
        UnknownVersion: The version is not kept, or its parts are not all available any more.
        UnfitVersion: The label has an invalid form, or there are too many labels.
        ControlConflict: Another client changed control in the meantime.
    """
    if (asked.version is None) != asked.remove:
        raise SettingsError("a label needs either a version or --remove", "see `springtide label --help`")
    registry = open_registry(settings)
    if asked.version is not None:
        registry.chain(asked.version)
    control = current(registry, asked.if_generation)
    new = transitions.label(control, asked.name, asked.version, actor=actor(), reason=asked.reason, now_ms=now_ms)
    done = f"{asked.name} is no label of ours any more" if asked.remove else f"{asked.name} is version {asked.version}"
    put(registry, control, new, done, asked, say)


def follow(settings: Settings, asked: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Makes serving follow the newest version again.

    Raises:
        ControlConflict: Another client changed control in the meantime.
    """
    registry = open_registry(settings)
    control = current(registry, asked.if_generation)
    new = transitions.follow(control, actor=actor(), reason=asked.reason, now_ms=now_ms)
    put(registry, control, new, f"answers follow the newest version of epoch {control.epoch}", asked, say)


def switch(settings: Settings, asked: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Holds or releases publishing, pauses or resumes training; release and resume also clear a hold of the guard.

    Raises:
        ControlConflict: Another client changed control in the meantime.
    """
    registry = open_registry(settings)
    control = current(registry, asked.if_generation)
    transition, on, done = SWITCHES[asked.command]
    who: dict[str, Any] = {"actor": actor(), "reason": asked.reason, "now_ms": now_ms}
    if control.held is not None and asked.command in ("release", "resume"):
        new = transitions.release(control, action=asked.command, **who)
        done = f"{control.held.rule} is let go: {done}, and this place is not held again"
        put(registry, control, new, done, asked, say)
        return
    new = transition(control, on, **who)
    put(registry, control, new, done, asked, say)


def unmask(settings: Settings, asked: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Lifts masks, and reports how the masked clicks come back.

    Raises:
        UnfitMask: There is no mask with such a number.
        ControlConflict: Another client changed control in the meantime.
    """
    registry = open_registry(settings)
    control = current(registry, asked.if_generation)
    new = transitions.unmask(control, asked.masks, actor=actor(), reason=asked.reason, now_ms=now_ms)
    put(registry, control, new, f"{', '.join(map(str, asked.masks))} lifted; {coming_back(new)}", asked, say)


def coming_back(control: transitions.Control) -> str:
    """Describes how the clicks of lifted masks come back.

    >>> first = transitions.start(actor="trainer", reason="first start", now_ms=0)
    >>> coming_back(first)
    'new clicks count again; what was left out comes back at the next exact rollback: `springtide rollback --to V --mode exact --reason TEXT`'
    """
    base = "V" if control.base is None else control.base
    return (
        "new clicks count again; what was left out comes back at the next exact rollback: "
        f"`springtide rollback --to {base} --mode exact --reason TEXT`"
    )


SWITCHES = {
    "hold": (transitions.publish, False, "the trainer learns on and publishes no version until `springtide release`"),
    "release": (transitions.publish, True, "the trainer publishes versions again"),
    "pause": (transitions.train, False, "the trainer takes no record until `springtide resume`; answers go on"),
    "resume": (transitions.train, True, "the trainer takes records again"),
}
