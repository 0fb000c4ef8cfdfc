"""The operator's commands on control: pin and follow, label, hold and release, pause and resume, unmask."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from deploy.operate.masking import mask_document
from deploy.operate.versions import open_registry
from state.config.settings import Settings
from state.errors import ControlConflict, RegistryError, SettingsError
from state.process.actor import actor
from state.registry import control as transitions
from state.registry.control import Control, encode
from state.registry.registry import Registry

Say = Callable[[str], None]


def current(registry: Registry, if_generation: int | None = None) -> Control:
    """Returns the newest control generation.

    Raises:
        RegistryError: There is no control yet.
        ControlConflict: It is not `if_generation`, because control has changed since the caller read it.
    """
    control = registry.control()
    if control is None:
        raise RegistryError(f"{registry.path}: no control yet", "start the trainer first, it writes generation 1")
    if if_generation is not None and control.generation != if_generation:
        raise ControlConflict(
            f"control is at generation {control.generation} and no longer at {if_generation}: {control.action} by "
            f"{control.actor}, {control.reason}",
            "check it, then repeat the command if it still applies",
        )
    return control


def put(registry: Registry, old: Control, new: Control, result: str, args: argparse.Namespace, say: Say) -> None:
    """Creates the generation `new` if it differs from `old`, and reports the result.

    Raises:
        ControlConflict: Another client changed control in the meantime.
    """
    changed = new is not old
    if changed:
        registry.propose(new)
    if args.output == "json":
        say(json.dumps({"changed": changed, "control": control_document(new)}, indent=2))
    elif changed:
        say(f"generation {new.generation}: {result}")
    else:
        say(f"generation {old.generation}: already in this state; nothing was changed")


def control_document(control: Control) -> dict[str, Any]:
    """Returns a control generation as JSON values; a mask's users are counted, not listed."""
    document: dict[str, Any] = json.loads(encode(control))
    return {**document, "mask": mask_document(control.mask)}


def pin(settings: Settings, args: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Pins serving to one version; training continues."""
    registry = open_registry(settings)
    registry.chain(args.version)
    old = current(registry, args.if_generation)
    new = transitions.pin(old, args.version, **_who(args, now_ms))
    put(registry, old, new, f"answers stay at version {args.version}", args, say)


def label(settings: Settings, args: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Sets a label on a version, or removes the label."""
    if (args.version is None) != args.remove:
        raise SettingsError("a label needs either a version or --remove", "see `springtide label --help`")
    registry = open_registry(settings)
    if args.version is not None:
        registry.chain(args.version)
    old = current(registry, args.if_generation)
    new = transitions.label(old, args.name, args.version, **_who(args, now_ms))
    result = f"the label {args.name} is removed" if args.remove else f"{args.name} is version {args.version}"
    put(registry, old, new, result, args, say)


def follow(settings: Settings, args: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Makes serving follow the newest version again."""
    registry = open_registry(settings)
    old = current(registry, args.if_generation)
    new = transitions.follow(old, **_who(args, now_ms))
    put(registry, old, new, f"answers follow the newest version of epoch {old.epoch}", args, say)


def switch(settings: Settings, args: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Holds or releases publishing, pauses or resumes training; release and resume also clear a hold of the guard."""
    registry = open_registry(settings)
    old = current(registry, args.if_generation)
    transition, on, result = SWITCHES[args.command]
    if old.held is not None and args.command in ("release", "resume"):
        new = transitions.release(old, action=args.command, **_who(args, now_ms))
        result = f"the update held for {old.held.rule} is accepted: {result}, and these records are not held again"
    else:
        new = transition(old, on, **_who(args, now_ms))
    put(registry, old, new, result, args, say)


def unmask(settings: Settings, args: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Lifts masks, and reports how the masked clicks come back."""
    registry = open_registry(settings)
    old = current(registry, args.if_generation)
    new = transitions.unmask(old, args.masks, **_who(args, now_ms))
    base = "V" if new.base is None else new.base
    result = (
        f"{', '.join(map(str, args.masks))} lifted; new clicks count again; excluded clicks are learned at the next exact "
        f"rollback: `springtide rollback --to {base} --mode exact --reason TEXT`"
    )
    put(registry, old, new, result, args, say)


def _who(args: argparse.Namespace, now_ms: int) -> dict[str, Any]:
    return {"actor": actor(), "reason": args.reason, "now_ms": now_ms}


SWITCHES = {
    "hold": (
        transitions.publish,
        False,
        "the trainer continues to learn and publishes no version until `springtide release`",
    ),
    "release": (transitions.publish, True, "the trainer publishes versions again"),
    "pause": (transitions.train, False, "the trainer reads no records until `springtide resume`; answers continue"),
    "resume": (transitions.train, True, "the trainer reads records again"),
}
