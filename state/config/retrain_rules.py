"""What a model that is learned anew every so often rules out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from state.config.conflict import Conflict
from state.config.spans import span_ms

if TYPE_CHECKING:
    from state.config.settings import Settings


def retrain(settings: Settings) -> Iterator[Conflict]:
    """Spans are written as spans, and no two trainers take one budget of privacy."""
    for name in ("retrain.every", "retrain.limit"):
        text = settings.value(name)
        if (text or name == "retrain.limit") and not span_ms(text):
            yield Conflict((name,), f"{name} {text!r} is no span of time", "write 1d, 12h, 30m or 90s")
    if settings.retrain.every and settings.privacy.epsilon:
        yield Conflict(
            ("retrain.every", "privacy.epsilon"),
            f"retrain.every {settings.retrain.every} begins trials, and with privacy.epsilon {settings.privacy.epsilon:g} there "
            "are none: two trainers would take the same noise, and who compares them is rid of it",
            "take retrain.every out, or set privacy.epsilon to 0",
        )
