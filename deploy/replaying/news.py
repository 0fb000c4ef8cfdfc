"""Synthetic readers of a newspaper: `python -m deploy.replaying.news FILE [--clicks N] [--seed N] [--repeat P ...]`.

Most clicks are on articles that are new to the reader, and articles live for hours. The parameters and their defaults:

    readers 3000            readers; the activity of the r-th one is proportional to r ** -0.7
    sections 12             sections; a reader's taste is a Dirichlet draw over them (concentration 0.4)
    articles_a_day 600      articles, born at random times, each with a quality drawn from a Pareto distribution
                            (exponent 1.2, plus 0.05)
    story_articles 3        articles of a story on average; later ones follow within `ends_h`, with the story's quality
    fades_h 2.5             age in which the appeal of an article falls to 1/e
    ends_h 12               age from which on it has no readers
    clicks_a_day 24000      clicks, four times as many by day as by night
    session 4, pause_s 45   mean clicks of a visit, and mean seconds between two of them
    follow 0.35             how often a reader continues with an unread article of the same story
    repeat 0.02             how often a reader opens one of the latest 20 articles again
    breaking_a_day 2        breaking news: stories of 8 articles within two hours, with 30 times the quality; all
                            readers like them, regardless of the section

A reader draws an unread article with a probability proportional to quality * exp(-age / fades) * taste of its section.
The category of a click is the section, or with `by_story` the story.

The clicks depend only on the parameters and the seed. The file is CSV or JSON lines, by its suffix, with the field names of
`[events]`; `springtide evaluate FILE` and `springtide replay FILE` read it.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson

from deploy.replaying.shoppers import Clicks, action_shares, encode, zipf
from state.config.sections import Events

HOUR_MS, DAY_MS = 3_600_000, 86_400_000
ACTIVITY, TASTE = 0.7, 0.4
PARETO, LEAST_QUALITY = 1.2, 0.05
BREAKING_ARTICLES, BREAKING_FACTOR, BREAKING_MS = 8, 30.0, 2 * HOUR_MS
REMEMBERED = 20

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class News:
    """The parameters of the module's docstring."""

    readers: int = 3000
    sections: int = 12
    articles_a_day: int = 600
    story_articles: float = 3.0
    fades_h: float = 2.5
    ends_h: float = 12.0
    clicks_a_day: int = 24_000
    session: float = 4.0
    pause_s: float = 45.0
    follow: float = 0.35
    repeat: float = 0.02
    breaking_a_day: float = 2.0


NEWS = News()


@dataclass
class _Articles:
    """The articles by time of birth.

    Attributes:
        born_ms: `[a]` int64, ascending.
        quality: `[a]` float64.
        section: `[a]` int64.
        story: `[a]` int64, a number.
        breaking: `[a]` bool.
    """

    born_ms: I64
    quality: F64
    section: I64
    story: I64
    breaking: npt.NDArray[np.bool_]


class NewsReaders:
    """Readers with a clock of their own.

    Args:
        begin_ms: Their clock before the first click, Unix ms.
        actions: Names of actions, the most frequent first.
        by_story: Whether the category of a click is the story and not the section.
    """

    def __init__(
        self,
        news: News = NEWS,
        seed: int = 7,
        begin_ms: int = 0,
        actions: Sequence[str] = ("view",),
        by_story: bool = False,
    ) -> None:
        self._news, self._begin_ms, self._by_story = news, begin_ms, by_story
        self._random, self._drawn = np.random.default_rng(seed), np.random.default_rng(seed + 1)
        self._tastes = self._random.dirichlet(np.full(news.sections, TASTE), news.readers)
        self._activity = zipf(news.readers, ACTIVITY)
        self._actions, self._shares = list(actions), action_shares(len(actions))
        self._read: list[set[int]] = [set() for _ in range(news.readers)]
        self._latest: list[deque[int]] = [deque(maxlen=REMEMBERED) for _ in range(news.readers)]
        self._stories, self._day = 0, 0
        # Articles of the day before the first day, which readers read on the first day.
        self._articles = self._born(-1)
        # The remaining clicks of the day: readers and times.
        self._visits: tuple[list[int], list[int]] = ([], [])

    def click(self, n: int) -> Clicks:
        """The next n clicks."""
        readers, articles, times = list[int](), list[int](), list[int]()
        while len(readers) < n:
            if not self._visits[0]:
                self._begin_day()
            count = min(n - len(readers), len(self._visits[0]))
            for reader, at_ms in zip(self._visits[0][:count], self._visits[1][:count], strict=True):
                readers.append(reader)
                articles.append(self._choose(reader, at_ms))
                times.append(at_ms)
            self._visits = self._visits[0][count:], self._visits[1][count:]
        articles_so_far = self._articles
        categories = articles_so_far.story[articles] if self._by_story else articles_so_far.section[articles]
        kind = "story" if self._by_story else "section"
        return Clicks(
            users=[f"reader-{number}" for number in readers],
            items=[f"article-{number}" for number in articles],
            categories=[f"{kind}-{number}" for number in categories.tolist()],
            actions=self._drawn.choice(self._actions, n, p=self._shares).tolist(),
            at_ms=self._begin_ms + np.array(times, np.int64),
        )

    def _begin_day(self) -> None:
        self._add(self._born(self._day))
        news, random = self._news, self._random
        visits = max(1, round(news.clicks_a_day / news.session))
        begins = random.uniform(0, DAY_MS, 3 * visits)
        by_day = 0.625 + 0.375 * np.sin((begins / DAY_MS - 0.25) * 2 * np.pi)
        begins = begins[random.random(begins.size) < by_day][:visits]
        readers = random.choice(news.readers, begins.size, p=self._activity)
        clicks = random.geometric(1.0 / news.session, begins.size)
        pauses_ms = random.exponential(news.pause_s * 1000, int(clicks.sum()))
        # The first click of a visit has no pause before it.
        firsts = np.cumsum(clicks) - clicks
        pauses_ms[firsts] = 0.0
        after = np.cumsum(pauses_ms)
        at_ms = self._day * DAY_MS + np.repeat(begins - after[firsts], clicks) + after
        # A visit ends at midnight.
        today = np.flatnonzero(at_ms < (self._day + 1) * DAY_MS)
        order = today[np.argsort(at_ms[today], kind="stable")]
        self._visits = np.repeat(readers, clicks)[order].tolist(), at_ms[order].astype(np.int64).tolist()
        self._day += 1

    def _born(self, day: int) -> _Articles:
        """The articles of the stories that begin on a day, by time of birth; those born after it are moved to its end."""
        news, random = self._news, self._random
        breaking = int(random.poisson(news.breaking_a_day))
        stories = max(1, round(news.articles_a_day / news.story_articles)) + breaking
        is_breaking = np.arange(stories) < breaking
        sizes = np.where(is_breaking, BREAKING_ARTICLES, random.geometric(1.0 / news.story_articles, stories))
        quality = (random.pareto(PARETO, stories) + LEAST_QUALITY) * np.where(is_breaking, BREAKING_FACTOR, 1.0)
        begins, count = random.uniform(0, DAY_MS, stories), int(sizes.sum())
        spread_ms = np.where(is_breaking, BREAKING_MS, news.ends_h * HOUR_MS / 2)
        later_ms = random.random(count) * np.repeat(spread_ms, sizes)
        later_ms[np.cumsum(sizes) - sizes] = 0.0
        born_ms = day * DAY_MS + np.minimum(np.repeat(begins, sizes) + later_ms, DAY_MS - 1.0)
        order = np.argsort(born_ms, kind="stable")
        numbers = np.repeat(self._stories + np.arange(stories), sizes)
        self._stories += stories
        return _Articles(
            born_ms[order].astype(np.int64),
            np.repeat(quality, sizes)[order],
            np.repeat(random.integers(0, news.sections, stories), sizes)[order],
            numbers[order],
            np.repeat(is_breaking, sizes)[order],
        )

    def _add(self, born: _Articles) -> None:
        articles = self._articles
        self._articles = _Articles(
            *(np.concatenate([getattr(articles, field.name), getattr(born, field.name)]) for field in fields(_Articles))
        )

    def _choose(self, reader: int, at_ms: int) -> int:
        news, random, articles, articles_read = self._news, self._random, self._articles, self._read[reader]
        latest = self._latest[reader]
        if latest and random.random() < news.repeat:
            return latest[int(random.integers(len(latest)))]
        begin, end = (
            int(np.searchsorted(articles.born_ms, time_ms)) for time_ms in (at_ms - news.ends_h * HOUR_MS, at_ms)
        )
        # If all articles have faded, the newest one is read.
        begin = min(begin, end - 1)
        alive = slice(begin, end)
        ages_h = (at_ms - articles.born_ms[alive]) / HOUR_MS
        likes = np.where(articles.breaking[alive], 1.0 / news.sections, self._tastes[reader, articles.section[alive]])
        appeal = articles.quality[alive] * np.exp(-ages_h / news.fades_h) * likes
        unread = np.array([article not in articles_read for article in range(begin, end)])
        if unread.any():
            appeal = np.where(unread, appeal, 0.0)
        if latest and random.random() < news.follow:
            of_story = articles.story[alive] == articles.story[latest[-1]]
            if (of_story & unread).any():
                appeal = np.where(of_story & unread, appeal, 0.0)
        drawn = np.cumsum(appeal)
        choice = int(np.searchsorted(drawn, random.random() * drawn[-1], side="right"))
        article = begin + min(choice, end - begin - 1)
        articles_read.add(article)
        latest.append(article)
        return article


def write(path: Path, clicks: Clicks, events: Events) -> None:
    """Writes clicks as a recording: CSV for `.csv`, else JSON lines."""
    values = encode(clicks, events).values
    if path.suffix != ".csv":
        path.write_bytes(b"".join(value + b"\n" for value in values))
        return
    rows = [orjson.loads(value) for value in values]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a recording; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the clicks of synthetic readers of a newspaper to a file.")
    parser.add_argument("file", type=Path, metavar="FILE", help="file to write: .csv, or JSON lines")
    parser.add_argument("--clicks", type=int, default=100_000, metavar="N", help="number of clicks (default 100,000)")
    parser.add_argument("--seed", type=int, default=7, metavar="N", help="random seed (default 7)")
    parser.add_argument(
        "--begin-ms", type=int, default=1_790_000_000_000, metavar="MS", help="time before the first click"
    )
    parser.add_argument("--by-story", action="store_true", help="make the story the category, and not the section")
    for field in fields(News):
        number: type[int] | type[float] = int if isinstance(field.default, int) else float
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=number,
            default=field.default,
            metavar="N",
            help=f"default {field.default}",
        )
    options = parser.parse_args(argv)
    news = News(**{field.name: getattr(options, field.name) for field in fields(News)})
    events = Events()
    readers = NewsReaders(news, options.seed, options.begin_ms, events.actions, options.by_story)
    write(options.file, readers.click(options.clicks), events)
    return 0


if __name__ == "__main__":
    sys.exit(main())
