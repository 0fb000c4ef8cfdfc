"""How far back a rollback can go: to the oldest kept version from which the training log is still complete."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from deploy.operate import log_view
from deploy.operate.times import age
from state.config.settings import Settings
from state.errors import CorruptVersion, SpringtideError, UnknownVersion
from state.registry.manifest import Manifest, sees
from state.registry.registry import Registry

ASK_KAFKA_S = 1.0


def oldest(registry: Registry, reaches: Callable[[Manifest], bool]) -> Manifest | None:
    """Returns the oldest version of the newest one's branch that a rollback can return to; None if there is none.

    Args:
        registry: The registry with the versions.
        reaches: Returns whether the training log is complete from a version on.
    """
    numbers = registry.versions()
    with suppress(CorruptVersion, UnknownVersion):
        line = registry.manifest(numbers[-1]).visible if numbers else ()
        for number in numbers:
            # Versions that are damaged, or removed in the meantime, are skipped.
            with suppress(CorruptVersion, UnknownVersion):
                if sees(line, number) and reaches(found := registry.manifest(number)):
                    return found
    return None


def look(settings: Settings, now_ms: int) -> dict[str, Any] | None:
    """Returns the horizon as JSON values; None if it is unknown: no registry, or no answer from Kafka."""
    if not settings.registry_dir.is_dir():
        return None
    try:
        registry = Registry(settings.registry_dir)
        view = log_view.look(settings, ASK_KAFKA_S)
        found = None if view is None else oldest(registry, lambda one: view.reaches(registry, one))
    except (SpringtideError, OSError):
        return None
    return None if found is None else of(found, now_ms)


def of(version: Manifest, now_ms: int) -> dict[str, Any]:
    """Returns the number and age of the oldest version as JSON values."""
    return {"version": version.version, "age_s": max(0, now_ms - version.created_at_ms) / 1000}


def as_text(found: Mapping[str, Any]) -> tuple[str, str]:
    """Formats the horizon for `springtide status`: a keyword and a description.

    >>> as_text({"version": 7, "age_s": 5400.0})
    ('reaches', 'back 1 h 30 min, to version 7')
    """
    return "reaches", f"back {age(found['age_s'])}, to version {found['version']}"
