"""Sizes of segments and progress of their keeper, from its metrics, for `springtide status` and the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploy.watch.messages import seconds
from deploy.watch.progress import FEW_RECORDS
from deploy.watch.scrape import SEGMENTS, Scrape
from state.config.settings import Settings
from state.segments.expression import texts_of

PREFIX = "springtide_segments_"
FIGURES = {"lag": "lag_records", "waiting": "waiting", "sweep_s": "sweep_seconds"}
"""By name of the figure, the suffix of its series."""
FEW_USERS = 20_000
"""Waiting users that are evaluated within six seconds. Alerts use this bound and FEW_RECORDS, with a delay."""


def look(settings: Settings, scrapes: Mapping[str, Scrape]) -> dict[str, Any] | None:
    """Returns each segment with its size, and the keeper's progress; None if no segment is configured.

    Args:
        settings: Settings of the loop.
        scrapes: Metrics by process, including the keeper's.
    """
    texts, found = texts_of(settings), scrapes.get(SEGMENTS)
    if not texts or found is None:
        return None
    users = found.by(f"{PREFIX}members", "segment")
    return {
        "problem": found.problem,
        **{name: found.value(PREFIX + end) for name, end in FIGURES.items()},
        "segments": [
            {"name": name, "users": int(users[name]) if name in users else None, "expression": text}
            for name, text in texts.items()
        ],
    }


def as_text(found: Mapping[str, Any]) -> tuple[str, str]:
    """Formats segments for `springtide status`: a keyword and a description.

    >>> kept = {"problem": "", "lag": 2.0, "waiting": 0.0, "sweep_s": 41.0}
    >>> kept["segments"] = [{"name": "sporty", "users": 1200, "expression": "..."}, {"name": "idle", "users": 0, "expression": "..."}]
    >>> word, text = as_text(kept)
    >>> word
    'kept'
    >>> for sentence in text.split("; "):
    ...     print(sentence)
    sporty 1,200, idle 0 users
    2 records of the training log and 0 users wait, all users were looked at in 41 s
    >>> as_text(kept | {"lag": 4000.0})[0], as_text(kept | {"problem": "it does not answer"})
    ('BEHIND', ('AWAY', 'it does not answer'))
    """
    if found["problem"]:
        return "AWAY", found["problem"]
    lag, waiting, sweep_s = (found[name] or 0.0 for name in FIGURES)
    sizes = ", ".join(f"{one['name']} {one['users'] or 0:,}" for one in found["segments"])
    looked = f"all users were looked at in {seconds(sweep_s)}" if sweep_s else "not all users were looked at yet"
    said = f"{lag:,.0f} records of the training log and {waiting:,.0f} users wait, {looked}"
    return "BEHIND" if lag > FEW_RECORDS or waiting > FEW_USERS else "kept", f"{sizes} users; {said}"
