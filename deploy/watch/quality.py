"""Quality of the model compared with simple baselines, for `springtide status`, from the trainer's metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploy.watch.scrape import Scrape

PREFIX = "springtide_trainer_quality_"
SERIES = {
    "log_loss": "log_loss", "mrr": "reciprocal_rank", "top1": "top1_ratio", "top5": "top5_ratio", "missed": "missed_ratio",
}  # fmt: skip
"""By name of the measure, the suffix of its series."""

USERS = ("all", "new", "known")
WORDS = {
    "popular": "what was popular in the last hour",
    "previous": "the user's previous category",
    "came_next": "what came next after it",
}
"""The baselines and their descriptions."""


def look(trainer: Scrape) -> dict[str, Any] | None:
    """Returns the measures by predictor and group of users, and the lift; None before any row was scored."""
    found = {
        predictor: {users: {name: trainer.value(PREFIX + end, predictor=predictor, users=users) for name, end in SERIES.items()}
                    for users in (USERS if predictor == "model" else USERS[:1])}
        for predictor in ("model", *WORDS)
    }  # fmt: skip
    if found["model"]["all"]["top1"] is None:
        return None
    lift = {
        name: trainer.value(f"springtide_trainer_lift_{end}")
        for name, end in (("top1", "top1_ratio"), ("log_loss", "log_loss"))
    }
    return {"predictors": found, "lift": lift, "skipped": trainer.value(f"{PREFIX}skipped_ratio")}


def as_text(found: Mapping[str, Any]) -> tuple[str, str]:
    """Formats the quality for `springtide status`: lift of top 1 in percentage points, and a description.

    >>> one = dict.fromkeys(SERIES, 0.25) | {"log_loss": 3.5}
    >>> simple = {name: {"all": one | {"top1": 0.2}} for name in WORDS}
    >>> model = {"all": one | {"top1": 0.3}, "new": dict.fromkeys(SERIES), "known": one}
    >>> lift = {"top1": 0.1, "log_loss": 0.5}
    >>> word, text = as_text({"predictors": {"model": model, **simple}, "lift": lift, "skipped": 0.04})
    >>> word
    '+10.0 points'
    >>> for sentence in text.split("; "):
    ...     print(sentence)
    more often right than what is simple: top 1 30.0 % against 20.0 % of what was popular in the last hour
    top 5 25.0 %, MRR 0.250, log loss 3.500 (0.500 less), missed 25.0 %
    known users: top 1 25.0 %, top 5 25.0 %, log loss 3.500
    of these rows 4.0 % were skipped by the guard and not learned
    """
    model, lift = found["predictors"]["model"], found["lift"]
    simple = {name: found["predictors"][name]["all"]["top1"] or 0.0 for name in WORDS}
    best = max(simple, key=lambda name: simple[name])
    above = (lift["top1"] or 0.0) >= 0
    every = model["all"]
    parts = [
        f"{'more' if above else 'LESS'} often right than what is simple: top 1 {_share(every['top1'])} against "
        f"{_share(simple[best])} of {WORDS[best]}",
        f"top 5 {_share(every['top5'])}, MRR {_number(every['mrr'])}, log loss {_number(every['log_loss'])} "
        f"({_less(lift['log_loss'])}), missed {_share(every['missed'])}",
    ]
    parts += [
        f"{users} users: top 1 {_share(one['top1'])}, top 5 {_share(one['top5'])}, log loss {_number(one['log_loss'])}"
        for users, one in model.items()
        if users != "all" and one["top1"] is not None
    ]
    if found["skipped"]:
        parts.append(f"of these rows {_share(found['skipped'])} were skipped by the guard and not learned")
    return f"{100 * (lift['top1'] or 0.0):+.1f} points", "; ".join(parts)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _less(value: float | None) -> str:
    return "-" if value is None else f"{abs(value):.3f} {'less' if value >= 0 else 'MORE'}"
