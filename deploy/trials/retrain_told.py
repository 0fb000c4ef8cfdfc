"""Status of the scheduled retrain for `springtide status` and `springtide trial list`, as JSON values and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploy.operate.times import age, iso
from state.config.settings import Settings
from state.config.spans import span_ms
from state.errors import SpringtideError
from state.registry.sealed import as_values
from state.trials.retraining import Retrainings

WORDS = {"promoted": "PROMOTED", "dropped": "dropped", "failed": "FAILED", "": "runs"}


def look(settings: Settings, now_ms: int) -> dict[str, Any] | None:
    """Returns the schedule and the newest retrain; None if there is no schedule and never was one.

    Args:
        settings: Settings of the loop.
        now_ms: Wall clock.
    """
    try:
        known = Retrainings(settings.state_dir).read()
    except SpringtideError as error:
        return {"problem": str(error)}
    every_ms = span_ms(settings.retrain.every)
    if known is None and every_ms is None:
        return None
    found: dict[str, Any] = {"every": settings.retrain.every, "problem": ""}
    if known is None:
        return found
    due_ms = None if every_ms is None or known.under_way else known.due_ms(every_ms)
    return (
        found | as_values(known) | {"due_ms": due_ms, "due_in_s": None if due_ms is None else (due_ms - now_ms) / 1000}
    )


def as_text(told: Mapping[str, Any]) -> tuple[str, str]:
    """Formats the retrain's status: a keyword and a description.

    >>> from state.trials.retraining import Retraining
    >>> over = as_values(Retraining(0).begin(60_000).end("dropped", "worse: +0.2 nats a row", 90_000))
    >>> as_text({"problem": "", "every": "1d", **over, "due_ms": 86_460_000, "due_in_s": 3600.0})
    ('dropped', 'retrain-19700101-000100 of 1970-01-01T00:01:00Z: worse: +0.2 nats a row; the next one begins in 1 h 0 min')
    >>> as_text({"problem": "", "every": "1d", **as_values(Retraining(0)), "due_ms": 5, "due_in_s": -3.0})
    ('none yet', 'the first one is due')
    """
    if told["problem"]:
        return "unknown", str(told["problem"])
    due_in_s = told.get("due_in_s")
    begins = "is on its way" if due_in_s is None else f"begins in {age(due_in_s)}" if due_in_s > 0 else "is due"
    if not told.get("name"):
        return "none yet", f"the first one {begins}"
    newest = f"{told['name']} of {iso(told['begun_at_ms'])}"
    if not told["outcome"]:
        return WORDS[""], newest
    return WORDS[told["outcome"]], f"{newest}: {told['reason']}; " + (
        f"the next one {begins}" if told["every"] else "retrain.every is empty: there is no next one"
    )
