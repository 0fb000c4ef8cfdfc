"""The registry's state for `springtide status`: its newest version, and the desired state in control."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploy.operate.versions import open_registry
from deploy.watch.messages import seconds, shown
from state.config.settings import Settings
from state.errors import SpringtideError


def look(settings: Settings, now_ms: int) -> dict[str, Any]:
    """Returns newest version and control as JSON values; if the registry cannot be read, the reason."""
    try:
        registry = open_registry(settings)
        control = registry.control()
        numbers = registry.versions()
        newest = registry.latest(None)
    except (SpringtideError, OSError) as error:
        return {"answers": False, "problem": str(error)}
    return {
        "answers": True,
        "problem": "",
        "versions": len(numbers),
        "newest": newest.version if newest else None,
        # A version can be newer than `now_ms`, the start of the command.
        "newest_age_s": max(0, now_ms - newest.created_at_ms) / 1000 if newest else None,
        "control": control
        and {
            "generation": control.generation,
            "action": control.action,
            "actor": control.actor,
            "reason": control.reason,
            "epoch": control.epoch,
            "base": control.base,
            "serving": control.serving.mode,
            "version": control.serving.version,
        },
    }


def as_text(registry: Mapping[str, Any]) -> str:
    """Describes the state in words; the registry must be readable."""
    control = registry["control"]
    newest = f"newest version {shown(registry['newest'])}, {seconds(registry['newest_age_s'])} old, {registry['versions']} kept"
    if control is None:
        return f"{newest}; no control yet"
    wanted = "the newest version" if control["serving"] == "follow" else f"version {control['version']} (pinned)"
    return f"{newest}; wanted: {wanted} in epoch {control['epoch']}, by {control['actor']}'s {control['action']}: {control['reason']}"
