"""What the commands on control share: the control there is, and the next one proposed and told."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from deploy.operate.masking import mask_document
from state.errors import ControlConflict, RegistryError
from state.registry import control_codec
from state.registry.control import Control
from state.registry.registry import Registry

Say = Callable[[str], None]


def current(registry: Registry, if_generation: int | None = None) -> Control:
    """The newest control.

    Args:
        registry: Where it is.
        if_generation: Its generation as the caller saw it; None: whichever it is.

    Raises:
        RegistryError: There is none yet.
        ControlConflict: It is of another generation: somebody changed control since the caller looked.
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
    """Creates the generation where it differs, and says so.

    Raises:
        ControlConflict: Somebody else changed control meanwhile.
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
    """A control generation as JSON values; a mask's users are counted, not listed."""
    document: dict[str, Any] = json.loads(control_codec.encode(control))
    return {**document, "mask": mask_document(control.mask)}
