"""Shared steps of the commands that change control: read the newest generation, propose the next, and report it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from deploy.operate.masking import mask_document
from state.errors import ControlConflict, RegistryError
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
            f"control is of generation {control.generation} and not {if_generation} any more: "
            f"{control.actor} gave {control.action}: {control.reason}",
            "look at it, then ask again if it still applies",
        )
    return control


def put(registry: Registry, old: Control, new: Control, done: str, asked: argparse.Namespace, say: Say) -> None:
    """Creates the generation `new` if it differs from `old`, and reports the result.

    Raises:
        ControlConflict: Another client changed control in the meantime.
    """
    changed = new is not old
    if changed:
        registry.propose(new)
    if asked.output == "json":
        say(json.dumps({"changed": changed, "control": control_document(new)}, indent=2))
    elif changed:
        say(f"generation {new.generation}: {done}")
    else:
        say(f"generation {old.generation}: it is so already; nothing was changed")


def control_document(control: Control) -> dict[str, Any]:
    """Returns a control generation as JSON values; a mask's users are counted, not listed."""
    document: dict[str, Any] = json.loads(encode(control))
    return {**document, "mask": mask_document(control.mask)}
