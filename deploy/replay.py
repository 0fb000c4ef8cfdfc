"""Clicks into the topic: of files, or of synthetic shoppers whose taste drifts.

    python -m deploy.replay FILE... [--speed 60x|max] [--keep-time] [--limit N] [--sort memory|assume] [--dry-run]
    python -m deploy.replay --synthetic [--rate N] [--limit N] [--speed X] [--seed N]
    python -m deploy.replay --burst USER CATEGORY N

Files are read by `state.recordings.files` and sent by `deploy.replaying.replay`. The
shoppers are `deploy.replaying.shoppers`, pure and deterministic; this file gives their
clicks a time and sends them.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from deploy.operate.options import SETTINGS_HELP
from deploy.replaying.clock import MAX, parse_speed
from deploy.replaying.command import add_arguments, run
from deploy.replaying.shoppers import Clicks, ShopperCrowd, encode
from state.config.loading import load
from state.config.sections import Events
from state.config.settings import Settings
from state.config.sources import split_settings
from state.errors import SettingsError, SpringtideError
from state.log import BulkWriter, Topics, append_encoded, partition_of, topic_plan
from state.process.closed_output import while_read
from state.process.ending import stop_on_signals
from state.process.wall_clock import wall_ms
from state.recordings.options import as_settings

SLICE_S = 0.1
MOST_PER_SLICE = 20_000


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
        rate: Clicks per second of the shoppers' clock; 0: as fast as `send` takes them.
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
        prog="springtide replay", description="Clicks into the topic.", epilog=SETTINGS_HELP, allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--synthetic", action="store_true", help="synthetic shoppers (settings [shoppers])")
    what.add_argument(
        "--burst", nargs=3, metavar=("USER", "CATEGORY", "N"), help="N clicks of one user in one category"
    )
    parser.add_argument("--limit", type=int, help="stop after so many events of this run")
    parser.add_argument(
        "--speed", default="", metavar="60x|max", help="recorded seconds per second (files: max, else 1x)"
    )
    parser.add_argument("--rate", type=float, help="of the shoppers, events/s; 0: as fast as Kafka takes them")
    parser.add_argument(
        "--head-start", type=int, default=0, metavar="N", help="clicks that the shoppers have made before: sent at once"
    )
    parser.add_argument("--seed", type=int, help="of the shoppers' choices")
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
        # At full speed the shoppers' clock keeps its rate, and nobody waits for it.
        rate = 0.0 if speed == MAX else rate
        sent = replay(shoppers, sender.send, rate, options.limit, speed, stopped, head_start_s=made_s / speed)
        took_s = max(time.monotonic() - started_s, 1e-9)
        print(f"sent {sent} clicks in {took_s:.1f} s ({sent / took_s:.0f}/s)", flush=True)


if __name__ == "__main__":
    sys.exit(while_read(main))
