"""The synthetic readers: what they click follows the stated parameters."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from deploy.replaying.news import DAY_MS, HOUR_MS, News, NewsReaders, main
from deploy.replaying.shoppers import Clicks

CLICKS = 30_000


@pytest.fixture(scope="module")
def clicks() -> Clicks:
    return NewsReaders(seed=3).click(CLICKS)


def test_nearly_all_clicks_are_on_articles_that_are_new_to_the_reader(clicks: Clicks) -> None:
    again = CLICKS - len({*zip(clicks.users, clicks.items, strict=True)})
    assert 0.01 < again / CLICKS < 0.025


def test_articles_live_for_hours(clicks: Clicks) -> None:
    first: dict[str, int] = {}
    read = set[tuple[str, str]]()
    ages = []
    for user, item, at_ms in zip(clicks.users, clicks.items, clicks.at_ms.tolist(), strict=True):
        begin_ms = first.setdefault(item, at_ms)
        # A reader may open an old article again.
        if (user, item) not in read:
            ages.append(at_ms - begin_ms)
        read.add((user, item))
    assert max(ages) <= News().ends_h * HOUR_MS
    assert np.mean(np.array(ages) < 6 * HOUR_MS) > 0.8


def test_popular_articles_and_a_readers_sections_have_most_clicks(clicks: Clicks) -> None:
    counts = np.array(sorted(Counter(clicks.items).values(), reverse=True))
    assert counts[: counts.size // 20].sum() > 0.3 * CLICKS
    # The busiest readers read nearly everything.
    usual = {user for user, count in Counter(clicks.users).items() if 15 <= count <= 40}
    shares = []
    for user in usual:
        sections = Counter(section for one, section in zip(clicks.users, clicks.categories, strict=True) if one == user)
        shares.append(sum(count for _, count in sections.most_common(4)) / sections.total())
    assert np.mean(shares) > 0.6


def test_times_ascend_and_days_are_busier_than_nights(clicks: Clicks) -> None:
    assert all(before <= after for before, after in pairwise(clicks.at_ms.tolist()))
    hours = clicks.at_ms % DAY_MS // HOUR_MS
    noon, midnight = (np.isin(hours, some).sum() for some in ((11, 12, 13), (23, 0, 1)))
    assert noon > 2 * midnight


def test_the_clicks_depend_on_the_seed_and_not_on_the_calls() -> None:
    readers = NewsReaders(seed=3)
    parts = [readers.click(700), readers.click(300)]
    whole = NewsReaders(seed=3).click(1000)
    assert [*parts[0].items, *parts[1].items] == whole.items
    assert NewsReaders(seed=4).click(1000).items != whole.items


@pytest.mark.parametrize("name", ["news.csv", "news.jsonl"])
def test_a_recording_has_all_clicks(tmp_path: Path, name: str) -> None:
    assert main([str(tmp_path / name), "--clicks", "50", "--sections", "3", "--repeat", "0"]) == 0
    lines = (tmp_path / name).read_text().splitlines()
    assert len(lines) == 50 + name.endswith("csv")
    assert "section-" in lines[-1] and "reader-" in lines[-1]
