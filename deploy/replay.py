"""Sends clicks to the topic, from files or from synthetic shoppers whose taste drifts.

    python -m deploy.replay FILE... [--speed 60x|max] [--keep-time] [--limit N] [--sort memory|assume] [--dry-run]
    python -m deploy.replay --synthetic [--rate N] [--limit N] [--speed X] [--seed N]
    python -m deploy.replay --burst USER CATEGORY N

`state.recordings.files` reads files and `deploy.replaying.command` sends them. `main` gives the
synthetic shoppers' clicks a time and sends them.

Each shopper has a taste: a vector of weights over the categories. A few favourites have nearly all
of the weight, the strongest first.

1. A shopper shops in sessions: consecutive clicks stay near one category with probability `STAY`.
2. Otherwise the category is drawn from the shopper's taste or, with probability `WANDER`, from the
   overall popularity (Zipf).
3. The taste drifts: its focus moves from one favourite to the next, once in `drift_s` on average. A
   fifth of the moves jump to a new category.
4. Items belong to categories. Within a category their popularity is Zipf too.

The clicks are deterministic: they depend only on the seed and the order of calls.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import orjson

from deploy.operate.options import SETTINGS_HELP
from deploy.replaying.clock import MAX, parse_speed
from deploy.replaying.command import add_arguments, run
from state.compiled import compiled
from state.config.loading import load
from state.config.sections import Events
from state.config.settings import Settings
from state.config.sources import split_settings
from state.errors import SettingsError, SpringtideError
from state.log import Topics, partition_of, topic_plan
from state.log.bulk import BulkWriter, append_encoded
from state.process.closed_output import while_read
from state.process.ending import stop_on_signals
from state.process.wall_clock import wall_ms
from state.recordings.options import as_settings

FAVOURITES = 4
STAY = 0.55
WANDER = 0.1
JUMP = 0.2
# Shares of the first four actions; further ones share the last.
ACTION_SHARES = (0.80, 0.07, 0.09, 0.04)
POPULARITY = 1.0
FOCUS_WEIGHTS = np.array([0.70, 0.18, 0.08, 0.04])

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
SLICE_S = 0.1
MOST_PER_SLICE = 20_000


@dataclass(frozen=True)
class Clicks:
    """n clicks in order of time.

    Attributes:
        users: n raw ids, as a shop would write them.
        items: n ids.
        categories: n names.
        actions: n names.
        at_ms: `[n]` int64, ascending.
    """

    users: Sequence[str]
    items: Sequence[str]
    categories: Sequence[str]
    actions: Sequence[str]
    at_ms: I64

    def __len__(self) -> int:
        return len(self.users)


def zipf(n: int, exponent: float = POPULARITY) -> F64:
    """`[n]` float64 probabilities that fall with the rank.

    >>> zipf(3).round(3).tolist()
    [0.545, 0.273, 0.182]
    """
    weights = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    return np.asarray(weights / weights.sum())


def action_shares(n: int) -> F64:
    """`[n]` float64: how often each of n actions happens.

    >>> action_shares(2).round(2).tolist(), len(action_shares(6))
    ([0.92, 0.08], 6)
    """
    shares = np.array((ACTION_SHARES + (ACTION_SHARES[-1] / 2,) * n)[:n])
    return np.asarray(shares / shares.sum())


@compiled(
    "i8[::1], i8[::1], f8[::1], i8[::1], i8[::1], bool[::1], i8[::1], f8[::1], i8[:, ::1], i8[::1], f8[::1], i8[::1]"
)
def walk(
    users: I64,
    at_ms: I64,
    chance: F64,
    wandering: I64,
    focus: I64,
    jumps: npt.NDArray[np.bool_],
    fresh: I64,
    waits_ms: F64,
    favourites: I64,
    session: I64,
    next_move_ms: F64,
    out: I64,
) -> None:
    """Chooses categories click after click: each depends on the shopper's last one.

    Args:
        users: `[n]` int64, who clicks.
        at_ms: `[n]` int64, when.
        chance: `[n]` float64 in [0, 1): stay, wander or follow the taste.
        wandering: `[n]` int64, the category if the shopper wanders.
        focus: `[n]` int64, which favourite it is if the shopper follows the taste.
        jumps: `[n]` bool, whether a move of the taste finds a new category.
        fresh: `[n]` int64, that new category.
        waits_ms: `[n]` float64, time until the taste's next move.
        favourites: `[users, FAVOURITES]` int64, the strongest first; changed.
        session: `[users]` int64, category of the last click; changed.
        next_move_ms: `[users]` float64, when each taste moves; changed.
        out: `[n]` int64, filled with the categories.
    """
    for row in range(len(users)):
        user = users[row]
        if at_ms[row] >= next_move_ms[user]:
            # The old focus becomes the weakest favourite, or is forgotten.
            old = favourites[user, 0]
            for rank in range(favourites.shape[1] - 1):
                favourites[user, rank] = favourites[user, rank + 1]
            favourites[user, -1] = old
            if jumps[row]:
                favourites[user, 0] = fresh[row]
            next_move_ms[user] = at_ms[row] + waits_ms[row]
            session[user] = favourites[user, 0]
        if chance[row] < STAY:
            out[row] = session[user]
        elif chance[row] < STAY + WANDER:
            out[row] = wandering[row]
        else:
            session[user] = favourites[user, focus[row]]
            out[row] = session[user]


def encode(clicks: Clicks, events: Events) -> tuple[list[bytes], list[bytes]]:
    """Keys and JSON values of clicks, with the field names of the settings.

    >>> clicks = Clicks(["ada"], ["i"], ["c"], ["view"], np.array([5]))
    >>> encode(clicks, Events())
    ([b'ada'], [b'{"user":"ada","item":"i","category":"c","action":"view","time":5}'])
    """
    names = (events.user, events.item, events.category, events.action, events.time)
    unit = 1 if events.time_unit in ("auto", "ms") else 1000
    times: list[object] = (clicks.at_ms // unit if unit > 1 else clicks.at_ms).tolist()
    if events.time_unit == "iso":
        times = [f"{time}Z" for time in clicks.at_ms.astype("datetime64[ms]").astype(str).tolist()]
    rows = zip(clicks.users, clicks.items, clicks.categories, clicks.actions, times, strict=True)
    values = [orjson.dumps(dict(zip(names, row, strict=True))) for row in rows]
    return [user.encode() for user in clicks.users], values


class ShopperCrowd:
    """A crowd of shoppers with a clock of its own."""

    def __init__(
        self,
        users: int,
        categories: int,
        items: int,
        drift_s: float,
        rate: float,
        seed: int,
        start_ms: int,
        actions: Sequence[str],
    ) -> None:
        """Gives each shopper a taste.

        Args:
            users: How many shoppers.
            categories: How many categories.
            items: How many items, at least one per category.
            drift_s: Seconds after which a taste has moved on, on average.
            rate: Clicks per second of them all; sets their clock's pace.
            seed: Of every choice.
            start_ms: Their clock at the first click, Unix ms.
            actions: Names, the most frequent first.
        """
        self._random = np.random.default_rng(seed)
        self._start_ms = start_ms
        self._made = 0
        self._step_ms = 1000.0 / rate if rate > 0 else 1.0
        self._drift_ms = drift_s * 1000.0
        self._popular = np.cumsum(zipf(categories))
        # The popular categories are not the first by name.
        order = self._random.permutation(categories)
        self._favourites = order[self._draw(self._popular, users * FAVOURITES)].reshape(users, FAVOURITES)
        self._order = order
        self._session = self._favourites[:, 0].copy()
        self._next_move_ms = start_ms + self._random.exponential(self._drift_ms, users)
        self._per_category = max(1, items // categories)
        self._item_ranks = np.cumsum(zipf(self._per_category))
        self._activity = np.cumsum(zipf(users, 0.6))
        self._shares = np.cumsum(action_shares(len(actions)))
        self._actions = np.array(actions, dtype=object)
        self._user_names = np.array([f"shopper-{number}" for number in range(users)], dtype=object)
        self._category_names = np.array([f"category-{number:02d}" for number in range(categories)], dtype=object)
        self._item_names = np.array(
            [f"item-{category:02d}-{rank:03d}" for category in range(categories) for rank in range(self._per_category)],
            dtype=object,
        )

    @classmethod
    def from_settings(cls, settings: Settings, seed: int | None, rate: float, start_ms: int) -> ShopperCrowd:
        """The shoppers of the section [shoppers]."""
        wanted = settings.shoppers
        return cls(
            users=wanted.users,
            categories=wanted.categories,
            items=wanted.items,
            drift_s=wanted.drift_s,
            rate=rate,
            seed=wanted.seed if seed is None else seed,
            start_ms=start_ms,
            actions=settings.events.actions,
        )

    def click(self, n: int) -> Clicks:
        """The next n clicks; the clock advances by n / rate seconds."""
        at_ms = self._start_ms + ((self._made + np.arange(1, n + 1)) * self._step_ms).astype(np.int64)
        self._made += n
        users = self._draw(self._activity, n)
        chance = self._random.random(n)
        wandering = self._order[self._draw(self._popular, n)]
        focus = self._draw(np.cumsum(FOCUS_WEIGHTS), n)
        jumps = self._random.random(n) < JUMP
        fresh = self._order[self._random.integers(0, len(self._order), n)]
        waits_ms = self._random.exponential(self._drift_ms, n)
        categories = np.empty(n, np.int64)
        walk(
            users,
            at_ms,
            chance,
            wandering,
            focus,
            jumps,
            fresh,
            waits_ms,
            self._favourites,
            self._session,
            self._next_move_ms,
            categories,
        )
        ranks = self._draw(self._item_ranks, n)
        actions = self._draw(self._shares, n)
        return Clicks(
            users=self._user_names[users].tolist(),
            items=self._item_names[categories * self._per_category + ranks].tolist(),
            categories=self._category_names[categories].tolist(),
            actions=self._actions[actions].tolist(),
            at_ms=at_ms,
        )

    def _draw(self, cumulative: F64, n: int) -> I64:
        """`[n]` ranks drawn from cumulative probabilities."""
        drawn = np.searchsorted(cumulative, self._random.random(n), side="right")
        return np.minimum(drawn, len(cumulative) - 1)


class Sender:
    """Sends clicks to the clicks topic, each user's in the partition of his key."""

    def __init__(self, settings: Settings) -> None:
        """Connects.

        Raises:
            UnreachableBroker: no broker answered in time.
            UnknownTopic: the clicks topic does not exist.
        """
        self._events: Events = settings.events
        self._bulk = BulkWriter(settings.kafka, settings.kafka.clicks_topic)
        self._partitions: dict[bytes, int] = {}

    def send(self, clicks: Clicks) -> None:
        """Sends clicks and returns when all are acknowledged.

        Kafka's timestamp of each is its own time.
        """
        if not len(clicks):
            return
        keys, values = encode(clicks, self._events)
        known = self._partitions
        for key in set(keys).difference(known):
            known[key] = partition_of(key, self._bulk.partitions)
        append_encoded(self._bulk, keys, values, clicks.at_ms, [known[key] for key in keys])

    def burst(self, user: str, category: str, count: int, at_ms: int, action: str = "") -> None:
        """Sends `count` clicks of one user in one category, one millisecond apart, the last at `at_ms`."""
        self.send(
            Clicks(
                users=[user] * count,
                items=[f"{category}-burst-{number % 10}" for number in range(count)],
                categories=[category] * count,
                actions=[action or self._events.actions[0]] * count,
                at_ms=np.arange(at_ms - count + 1, at_ms + 1, dtype=np.int64),
            )
        )

    def close(self) -> None:
        """Closes the connections."""
        self._bulk.close()

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def replay(
    shoppers: ShopperCrowd,
    send: Callable[[Clicks], None],
    rate: float,
    limit: int | None,
    speed: float,
    stopped: threading.Event,
    wall_s: Callable[[], float] = time.time,
    head_start_s: float = 0.0,
) -> int:
    """Lets the shoppers click until `stopped` or `limit`; returns the number of clicks sent.

    Every tenth of a second all clicks that are due go out together. A sender
    that cannot keep up falls behind in wall time, never in order.

    Args:
        shoppers: Whose clicks; their clock starts at `wall_s()`, less the head start.
        send: Takes clicks and returns when they are acknowledged.
        rate: Clicks per second of the shoppers' clock; 0: as fast as `send` accepts them.
        limit: So many clicks in all; None for no end.
        speed: Seconds of the shoppers' clock per second of the wall's.
        stopped: Ends the replay between two slices.
        wall_s: Unix time, seconds.
        head_start_s: How long the shoppers have been clicking already; those clicks are due at once.
    """
    started_s = wall_s() - head_start_s
    sent = 0
    while not stopped.is_set() and (limit is None or sent < limit):
        due = MOST_PER_SLICE if rate <= 0 else int((wall_s() - started_s) * speed * rate) - sent
        due = min(due, MOST_PER_SLICE, sys.maxsize if limit is None else limit - sent)
        if due > 0:
            send(shoppers.click(due))
            sent += due
        if rate > 0 and due < MOST_PER_SLICE:
            stopped.wait(SLICE_S)
    return sent


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    flags, words = split_settings(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="springtide replay",
        description="Send clicks to the clicks topic: from files, or from synthetic shoppers.",
        epilog=SETTINGS_HELP,
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--synthetic", action="store_true", help="send clicks of synthetic shoppers (settings [shoppers])"
    )
    what.add_argument(
        "--burst", nargs=3, metavar=("USER", "CATEGORY", "N"), help="send N clicks of one user in one category"
    )
    parser.add_argument("--limit", type=int, help="stop after this many events")
    parser.add_argument(
        "--speed",
        default="",
        metavar="60x|max",
        help="speed, in recorded seconds per second (default: max for files, else 1x)",
    )
    parser.add_argument(
        "--rate", type=float, help="events per second of the shoppers; 0: as fast as Kafka accepts them"
    )
    parser.add_argument(
        "--head-start",
        type=int,
        default=0,
        metavar="N",
        help="number of earlier clicks of the shoppers, which are sent at once",
    )
    parser.add_argument("--seed", type=int, help="random seed of the shoppers")
    add_arguments(parser)
    options = parser.parse_args(words)
    stopped = stop_on_signals()
    try:
        if bool(options.files) + options.synthetic + bool(options.burst) != 1:
            raise SettingsError("say what to replay: files, --synthetic, or --burst", "see `springtide replay --help`")
        if options.files and (options.rate is not None or options.seed is not None):
            raise SettingsError("--rate and --seed are of --synthetic", "files go at --speed")
        if options.dry_run and not options.files:
            raise SettingsError("--dry-run is of files", "name them")
        settings = load([*flags, *as_settings(options)])
        if options.files:
            run(options, settings, stopped)
        else:
            with Topics(settings.kafka) as topics:
                topics.ensure(*topic_plan.clicks(settings))
            make_clicks(options, settings, stopped)
    except SpringtideError as problem:
        print(f"springtide replay: {problem}", file=sys.stderr)
        return problem.exit_code
    return 0


def make_clicks(options: argparse.Namespace, settings: Settings, stopped: threading.Event) -> None:
    """Sends the clicks of shoppers, or a burst of one.

    Raises:
        SpringtideError: Kafka refused.
    """
    with Sender(settings) as sender:
        if options.burst:
            user, category, count = options.burst
            sender.burst(user, category, int(count), wall_ms())
            print(f"sent {int(count)} clicks of one user in {category}", flush=True)
            return
        rate = settings.shoppers.rate if options.rate is None else options.rate
        speed = parse_speed(options.speed or "1x")
        # How long the shoppers' clock has run already; without a pace there is nothing to be ahead of.
        made_s = options.head_start / rate if rate > 0 and speed != MAX else 0.0
        shoppers = ShopperCrowd.from_settings(settings, options.seed, rate, int((time.time() - made_s) * 1000))
        started_s = time.monotonic()
        # At full speed the shoppers' clock keeps its rate, and there is no waiting.
        rate = 0.0 if speed == MAX else rate
        sent = replay(shoppers, sender.send, rate, options.limit, speed, stopped, head_start_s=made_s / speed)
        took_s = max(time.monotonic() - started_s, 1e-9)
        print(f"sent {sent} clicks in {took_s:.1f} s ({sent / took_s:.0f}/s)", flush=True)


if __name__ == "__main__":
    sys.exit(while_read(main))
