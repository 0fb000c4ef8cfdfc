"""How far back a rollback reaches: to the oldest version that is kept and that the training log still leads on from."""

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
    """The oldest version of the newest one's line that can be gone back to; None where there is none.

    Args:
        registry: Where versions are.
        reaches: Whether the training log leads on from a version.
    """
    numbers = registry.versions()
    with suppress(CorruptVersion, UnknownVersion):
        line = registry.visible(numbers[-1]) if numbers else ()
        for number in numbers:
            # What is removed or damaged meanwhile is passed over.
            with suppress(CorruptVersion, UnknownVersion):
                if sees(line, number) and reaches(found := registry.manifest(number)):
                    return found
    return None


def look(settings: Settings, now_ms: int) -> dict[str, Any] | None:
    """The horizon as JSON values; None where nobody knows: no registry, or no answer from Kafka."""
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
    """What is shown of the oldest version."""
    return {"version": version.version, "age_s": max(0, now_ms - version.created_at_ms) / 1000}


def as_text(found: Mapping[str, Any]) -> tuple[str, str]:
    """A word and the rest, in words.

    >>> as_text({"version": 7, "age_s": 5400.0})
    ('reaches', 'back 1 h 30 min, to version 7')
    """
    return "reaches", f"back {age(found['age_s'])}, to version {found['version']}"
