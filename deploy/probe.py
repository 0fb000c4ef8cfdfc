"""Sends clicks of probe users through the loop and times them: `springtide probe [-o json] [--continuously]`.

Once, or each `probe.every_s` with the figures on /metrics. Clicks go to Kafka as
any producer's, and answers are asked for as any client's, so that it may run
wherever both are reached.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np

from deploy.operate.options import SETTINGS_HELP
from deploy.replaying.sender import Outbox, Piece
from deploy.serving.edge.tokens import READ, are_wanted, tokens_in
from deploy.watch.address import serving_address
from deploy.watch.end_to_end import Passage, Sent, Stopwatch
from springtide_client import Client, Profile, Retries
from state.config.loading import load
from state.config.settings import Settings
from state.errors import LogError, SpringtideError
from state.events.probe_users import SLOTS, probe_user
from state.log import Topics
from state.metrics import ProbeMetrics, served
from state.process import log_lines
from state.process.closed_output import while_read
from state.process.ending import stop_on_signals
from state.process.said_once import SaidOnce
from state.process.wall_clock import wall_ms

REASONS = ("kafka", "answers", "refused", "features", "weights")
EVERY_S = 30.0
ANSWER_S = 5.0
_log = logging.getLogger(__name__)


class Probe:
    """A stopwatch on a real loop; a probe begins with connections of its own, as after any failure.

    Args:
        settings: Of the loop.
        stop: Gives up what is under way.
        first: The number of the first probe user; each probe takes the next.
    """

    def __init__(self, settings: Settings, stop: threading.Event, first: int) -> None:
        self._settings, self._stop, self._number = settings, stop, first

    def time(self) -> Passage:
        """Times one click; connecting is not counted.

        Raises:
            SettingsError: Clicks are not JSON here, or the token or certificate cannot be read.
        """
        self._number += 1
        kafka = self._settings.kafka
        with ExitStack() as connections:
            client = connections.enter_context(self._client())

            def ask(user: str, at_ms: int) -> Profile:
                return client.profile(user, at=at_ms, fields=("features", "sources"), top=1)

            try:
                with Topics(kafka) as topics:
                    topic_id = topics.describe(kafka.clicks_topic).topic_id
                outbox = connections.enter_context(Outbox(kafka, kafka.clicks_topic))
            except LogError as error:
                return Passage(reason="kafka", problem=f"the click could not be sent: {error}")

            def send(user: str, click: bytes) -> Sent:
                piece = Piece([user.encode()], [click], np.array([wall_ms()]))
                ((partition, after),) = outbox.send(piece).items()
                return Sent(f"{topic_id}:{partition}", after - 1)

            watch = Stopwatch(self._settings, send, ask, wall_ms, time.monotonic, self._stop.wait, self._stop.is_set)
            return watch.time(probe_user(self._number))

    def _client(self) -> Client:
        settings = self._settings
        address = serving_address(settings)
        token = tokens_in(settings.tokens_dir / READ)[0] if are_wanted(settings) else None
        return Client(
            settings.probe.url or address,
            timeout_s=ANSWER_S,
            retries=Retries(most=0),
            token=token,
            verify=address.context() or True,
        )


def count(found: Passage, metrics: ProbeMetrics, now_s: float) -> None:
    """Counts what became of a probe; what it reached before it failed counts too."""
    if found.feature_seconds is not None:
        metrics.feature_seconds.observe(found.feature_seconds)
    if found.weight_seconds is not None:
        metrics.weight_seconds.observe(found.weight_seconds)
    if found.reason:
        metrics.failures.labels(found.reason).inc()
    else:
        metrics.last_success.set(now_s)


def run(settings: Settings, stop: threading.Event, time_one: Callable[[], Passage], metrics: ProbeMetrics) -> None:
    """Probes each `probe.every_s` until `stop`."""
    for reason in REASONS:
        metrics.failures.labels(reason)
    say, every_s = SaidOnce(_log.warning), settings.probe.every_s or EVERY_S
    while not stop.is_set():
        begun_s = time.monotonic()
        found = time_one()
        if stop.is_set():
            return
        count(found, metrics, time.time())
        if found.reason:
            say(f"a probe did not come through ({found.reason}); {found.problem}")
        else:
            say.clear()
        stop.wait(max(0.0, begun_s + every_s - time.monotonic()))


def parser() -> argparse.ArgumentParser:
    """The command's options; settings are read beside them."""
    made = argparse.ArgumentParser(
        prog="springtide probe",
        description="Sends a click of a probe user through the loop and says after how long answers show it, and after how "
        "long their version has learned from it. Such a click names no item and no category, so that it changes no measure, "
        "candidate or weight. Exit codes: 0 it came through, 1 it did not, 2 wrong use.",
        epilog=SETTINGS_HELP,
        allow_abbrev=False,
    )
    made.add_argument("-o", "--output", choices=("text", "json"), default="text", help="how to print (default text)")
    made.add_argument(
        "--continuously",
        action="store_true",
        help=f"each probe.every_s ({EVERY_S:g} s where that is 0), with the figures on probe.metrics_port, until Ctrl-C",
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    asked, flags = parser().parse_known_args(sys.argv[1:] if argv is None else argv)
    stop = stop_on_signals()
    # What the client says of each try is said once by what failed.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    try:
        settings = load(flags)
        probe = Probe(settings, stop, random.randrange(SLOTS))
        if asked.continuously:
            log_lines.begin("probe")
            log_lines.follow(settings.logs)
            logging.getLogger("httpx").setLevel(logging.WARNING)
            with served(settings.probe.metrics_port, settings.metrics.host) as registry:
                run(settings, stop, probe.time, ProbeMetrics(registry))
            return 0
        found = probe.time()
    except SpringtideError as error:
        print(f"springtide probe: {error}", file=sys.stderr)
        return error.exit_code
    if asked.output == "json":
        print(json.dumps(found.to_json()))
    elif found.reason:
        print(f"springtide probe: {found}", file=sys.stderr)
    else:
        print(found)
    return int(bool(found.reason))


if __name__ == "__main__":
    sys.exit(while_read(main))
