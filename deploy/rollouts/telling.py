"""Status of the newest rollout for `springtide status` and the page, as JSON values and in words, until it is ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploy.operate.times import age
from state.config.settings import Settings
from state.errors import SpringtideError
from state.process.wall_clock import wall_ms
from state.rollouts.assignment import LIVE, TRIAL
from state.rollouts.rollout import Rollout
from state.rollouts.rollouts import Rollouts

WORDS = {"halted": "HALTED", "back": "BACK"}
UNWATCHED_S = 60.0
"""A running rollout not judged for this long has no driver; a driver judges it every two seconds."""


def look(settings: Settings) -> dict[str, Any] | None:
    """Returns the newest rollout as JSON values; None if there is none to show, or it cannot be read."""
    rollouts = Rollouts(settings.registry_dir)
    try:
        newest = rollouts.newest()
    except SpringtideError:
        return None
    return None if newest is None or not newest.is_told else document(newest, rollouts.figures(newest), wall_ms())


def judged_ms(newest: Rollout, figures: Mapping[str, Any] | None) -> int:
    """Returns when the rollout was last judged or changed, wall clock ms."""
    return max(newest.at_ms, int(figures["judged_ms"]) if figures else 0)


def document(newest: Rollout, figures: Mapping[str, Any] | None, now_ms: int) -> dict[str, Any]:
    """Returns a rollout as JSON values.

    Args:
        newest: Its newest generation.
        figures: The figures of its arms; None before there are any.
        now_ms: Wall clock.
    """
    unwatched_s = (now_ms - judged_ms(newest, figures)) / 1000 if newest.phase == "running" else 0.0
    return {
        "name": newest.name,
        "phase": newest.phase,
        "share": newest.share,
        "steps": list(newest.steps),
        "since_ms": newest.since_ms,
        "at_ms": newest.at_ms,
        "actor": newest.actor,
        "reason": newest.reason,
        "stopped": newest.is_stopped,
        "unwatched_s": unwatched_s if unwatched_s > UNWATCHED_S else None,
        "compared": None if figures is None else dict(figures),
    }


def as_text(one: Mapping[str, Any]) -> tuple[str, str]:
    """Formats a rollout's status: a keyword and a description.

    >>> arms = {"trial": {"users": 12, "answers": 100, "rate": 0.31}, "live": {"users": 990, "answers": 9_000, "rate": 0.3}}
    >>> word, text = as_text({"name": "wider", "phase": "back", "share": 0.0, "actor": "gate", "reason": "it is worse",
    ...                       "unwatched_s": None, "compared": {"arms": arms, "verdict": "worse: -9.0% to -1.0%"}})
    >>> word
    'BACK'
    >>> for sentence in text.split("; "):
    ...     print(sentence)
    wider answers 0% of the users (gate: it is worse)
    0.3100 engagements an answer over 100 answers to 12 users, against 0.3000 over 9,000 to 990
    worse: -9.0% to -1.0%
    """
    said = [f"{one['name']} answers {100 * one['share']:.4g}% of the users ({one['actor']}: {one['reason']})"]
    compared, word = one["compared"], WORDS.get(one["phase"], one["phase"])
    if one["unwatched_s"] is not None:
        word = "UNWATCHED"
        said.append(f"nobody has judged it for {age(one['unwatched_s'])}: `springtide rollout {one['name']}` goes on")
    if compared is None:
        return word, "; ".join([*said, "nobody was answered yet that is known of"])
    trial, live = compared["arms"][TRIAL], compared["arms"][LIVE]
    said.append(
        f"{trial['rate']:.4f} engagements an answer over {trial['answers']:,} answers to {trial['users']:,} users, "
        f"against {live['rate']:.4f} over {live['answers']:,} to {live['users']:,}"
    )
    return word, "; ".join([*said, compared["verdict"]])
