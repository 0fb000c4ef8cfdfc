"""Clicks of readers of a newspaper: stories live for hours, and many of tomorrow's are not there today."""

from __future__ import annotations

import numpy as np

from state.features.spec import EVENT
from tests.bench.recorded import SOURCE, START_MS, Recorded, hashed, plain

CLICKS, READERS, SECTIONS, DAYS = 120_000, 3000, 12, 5
STORIES_A_DAY, ARTICLES = 300, 4
FADES_H, ENDS_H = 2.5, 12.0  # interest in a story falls to 1/e, and nobody reads it any more
SAME_STORY = 0.35  # how often a reader goes on with it
DAY_MS, HOUR_MS = 86_400_000, 3_600_000


def news_clicks(seed: int = 7) -> Recorded:
    """Five days of clicks; the category of a click is its story, the item one of the story's articles."""
    chance = np.random.default_rng(seed)
    count = STORIES_A_DAY * DAYS
    born_ms = np.sort(chance.integers(-HOUR_MS * int(ENDS_H), DAY_MS * DAYS, count))
    weight, section = chance.pareto(1.2, count) + 0.05, chance.integers(0, SECTIONS, count)
    tastes = chance.dirichlet(np.full(SECTIONS, 0.4), READERS)
    activity = 1.0 / np.arange(1, READERS + 1) ** 0.7
    at_ms = _times(chance)
    users = chance.choice(READERS, CLICKS, p=activity / activity.sum())
    stories, last = np.empty(CLICKS, np.int64), np.full(READERS, -1)
    for click, (user, now_ms) in enumerate(zip(users.tolist(), at_ms.tolist(), strict=True)):
        begin, end = np.searchsorted(born_ms, (now_ms - HOUR_MS * ENDS_H, now_ms))
        story = last[user]
        if not begin <= story < end or chance.random() > SAME_STORY:
            age_h = (now_ms - born_ms[begin:end]) / HOUR_MS
            drawn = np.cumsum(weight[begin:end] * np.exp(-age_h / FADES_H) * tastes[user, section[begin:end]])
            story = begin + int(np.searchsorted(drawn, chance.random() * drawn[-1]))
        stories[click] = last[user] = story
    events = np.zeros(CLICKS, EVENT)
    events["at_ms"], events["offset"], events["topic"] = START_MS + at_ms, np.arange(CLICKS), SOURCE.topic
    ids = np.array([hashed(f"story {one}") for one in range(count)], np.uint64)
    articles = np.array([hashed(f"article {one}") for one in range(count * ARTICLES)], np.uint64)
    events["category"] = ids[stories]
    events["item"] = articles[stories * ARTICLES + chance.integers(0, ARTICLES, CLICKS)]
    events["action"] = chance.choice(4, CLICKS, p=(0.9, 0.04, 0.03, 0.03))
    readers = np.array([hashed(f"reader {one}") for one in range(READERS)], np.uint64)
    return plain(readers[users], events)


def _times(chance: np.random.Generator) -> np.ndarray:
    """`[CLICKS]` int64 ms, ascending: by day four times as many as by night."""
    drawn = chance.uniform(0, DAY_MS * DAYS, 3 * CLICKS)
    by_day = 0.625 + 0.375 * np.sin((drawn / DAY_MS - 0.25) * 2 * np.pi)
    kept: np.ndarray = np.sort(drawn[chance.random(3 * CLICKS) < by_day][:CLICKS]).astype(np.int64)
    return kept
