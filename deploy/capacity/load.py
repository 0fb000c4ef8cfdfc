"""What a deployment has to bear, and what follows from it: events kept, versions kept. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from state.config.settings import Settings

HOUR_S, DAY_S = 3600.0, 86_400.0
MONTH_S = 30 * DAY_S


@dataclass(frozen=True)
class Load:
    """What is asked for.

    Attributes:
        clicks_s: Clicks a second, on the average of the busiest hour.
        users: Users who click within the longest window; `max_users` of them have a history, `max_rows` a row.
        versions_s: Versions a second.
        answers_s: Answers a second, over all hosts.
        retention_h: How long Kafka keeps clicks and training log, hours.
        items: Items and categories; `max_rows` of them have a row.
        click_bytes: A click in Kafka, bytes, as producers compress it.
        answer: Kind of the answers: lean, full, recommend or explain.
    """

    clicks_s: float
    users: float
    versions_s: float = 5.0
    answers_s: float = 1000.0
    retention_h: float = 168.0
    items: float = 100_000.0
    click_bytes: float = 100.0
    answer: str = "lean"


def touched(count: float, drawn: float) -> float:
    """How many of `count` are met at least once by `drawn` draws, each as likely as any other; skewed draws meet fewer.

    >>> round(touched(1000, 100)), round(touched(1000, 1e6)), touched(0, 5)
    (95, 1000, 0.0)
    """
    return -count * math.expm1(-drawn / count) if count else 0.0


def events_kept(load: Load, settings: Settings, users: float) -> float:
    """Events in the history of each of so many users: those of the longest window, `features.history` at most.

    Where fewer users are kept than click, the ones kept are taken to make all clicks: those who clicked last stay.

    >>> load = Load(clicks_s=100, users=1e7)
    >>> events_kept(load, Settings(), 20_000), round(events_kept(load, Settings(), load.users), 2)
    (256.0, 6.05)
    """
    window_s = settings.features.windows_s[-1]
    return min(float(settings.features.history), load.clicks_s * window_s / users)


def kept_versions(settings: Settings) -> list[tuple[float, float]]:
    """How many durable versions are kept, and of how many seconds each, the newest tier first.

    >>> kept_versions(Settings())
    [(360.0, 10.0), (138.0, 600.0), (144.0, 3600.0)]
    """
    kept = settings.registry
    thin_from_s, sparse_from_s = kept.delta_keep_s, kept.base_keep_h * HOUR_S
    return [
        (thin_from_s / kept.durable_s, kept.durable_s),
        (max(0.0, sparse_from_s - thin_from_s) / kept.thin_s, kept.thin_s),
        (max(0.0, kept.base_keep_d * DAY_S - sparse_from_s) / kept.sparse_s, kept.sparse_s),
    ]
