"""Measures the latency of the whole loop with clicks of probe users: `springtide probe [-o json] [--continuously]`.

1. Request an answer, which shows that serving works and when the user's last click was.
2. Send the click; Kafka acknowledges it at an offset.
3. Request answers until the user's features show the click, and until the version has learned from its offset.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

import httpx
import numpy as np

from deploy.replaying.sender import Outbox, Piece
from deploy.serving.requests.access import READ, are_wanted, tokens_in
from deploy.watch.scrape import serving_address
from springtide_client import Client, ClientError, Profile, Refused, Retries
from state.config.loading import load
from state.config.settings import Settings
from state.errors import LogError, SettingsError
from state.events.identity import SLOTS, probe_user
from state.log import Topics
from state.metrics import ProbeMetrics, served
from state.process import log_lines
from state.process.commands import parser_of
from state.process.environment import wall_ms
from state.process.log_lines import SaidOnce
from state.process.part import run_command, stop_on_signals

POLL_S = 0.02
DECODER = "state.events.decoding:decode_json"
NEVER = 255
REASONS = ("kafka", "answers", "refused", "features", "weights")
EVERY_S = 30.0
TIMEOUT_S = 30.0  # of a click on its way through the loop
ANSWER_S = 5.0
_log = logging.getLogger(__name__)


class Sent(NamedTuple):
    """Position of a click: "topic id:partition" of the clicks topic, and the offset."""

    source: str
    offset: int


@dataclass(frozen=True)
class Passage:
    """The result of one probe.

    Attributes:
        source: "topic id:partition" of the click; empty if it was not sent.
        offset: Its offset; -1 if it was not sent.
        feature_seconds: From sending it until an answer's features showed it; None if none did.
        weight_seconds: From sending it until an answer's version had learned from it; None if no version did.
        version: That version, or the last one that answered; 0 for none.
        reason: Why the probe failed: kafka, answers, refused, features, weights; empty if it succeeded.
        problem: The same in words.
    """

    source: str = ""
    offset: int = -1
    feature_seconds: float | None = None
    weight_seconds: float | None = None
    version: int = 0
    reason: str = ""
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns the result as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Describes the result.

        >>> print(Passage("ab:0", 7, 0.2, 0.5, 41))
        the click at offset 7 of partition 0 was in answers after 0.20 s, and version 41 had learned from it after 0.50 s
        """
        if self.reason:
            return self.problem
        partition = self.source.rpartition(":")[2]
        return (
            f"the click at offset {self.offset} of partition {partition} was in answers after {self.feature_seconds:.2f} s, "
            f"and version {self.version} had learned from it after {self.weight_seconds:.2f} s"
        )


def action_of(settings: Settings) -> str:
    """Returns the action of probe clicks: the first that waits for no label and is no label.

    >>> action_of(Settings())
    'view'
    """
    later = {*settings.labels.impressions, *settings.labels.outcomes}
    return next((action for action in settings.events.actions if action not in later), settings.events.actions[0])


def click_of(user: str, at_ms: int, settings: Settings) -> bytes:
    """Returns a click that names only its user, as the settings' producers write one.

    Raises:
        SettingsError: The settings' clicks are not JSON.

    >>> click_of("springtide-probe-1", 1_500, Settings())
    b'{"user": "springtide-probe-1", "action": "view", "time": 1500}'
    """
    events = settings.events
    if events.decoder != DECODER:
        raise SettingsError(
            f"events.decoder is {events.decoder}: a probe writes its clicks as JSON only", "send clicks of your own"
        )
    fields: dict[str, object] = {events.user: user}
    if events.action:
        fields[events.action] = action_of(settings)
    if events.time:
        fields[events.time] = {
            "s": at_ms // 1000,
            "iso": datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds"),
        }.get(events.time_unit, at_ms)
    return json.dumps(fields).encode()


class ProbedLoop(NamedTuple):
    """The loop as a probe reaches it.

    Attributes:
        send: Sends a click of a user and returns its position once it is acknowledged.
        ask: Requests a profile with features and sources, of a user at a time.
    """

    send: Callable[[str, bytes], Sent]
    ask: Callable[[str, int], Profile]


class Stopwatch:
    """Sends clicks through a loop and times them. Not thread-safe."""

    def __init__(
        self,
        settings: Settings,
        loop: ProbedLoop,
        now_ms: Callable[[], int],
        clock: Callable[[], float],
        sleep: Callable[[float], object],
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._settings, self._loop = settings, loop
        self._now_ms, self._clock, self._sleep, self._stopped = now_ms, clock, sleep, stopped
        self._feature = f"{action_of(settings)}.recency"

    def time(self, user: str) -> Passage:
        """Sends one click of a probe user and waits for it, at most `TIMEOUT_S`.

        Raises:
            SettingsError: The settings' clicks are not JSON, or the tokens cannot be read.
        """
        at_ms = self._now_ms()
        click = click_of(user, at_ms, self._settings)
        # 1.
        try:
            before = self._recency(self._loop.ask(user, at_ms))
        except ClientError as error:
            return _unanswered(Passage(), error)
        # 2.
        begun_s = self._clock()
        try:
            sent = self._loop.send(user, click)
        except LogError as error:
            return Passage(reason="kafka", problem=f"the click could not be sent: {error}")
        # 3.
        return self._look(user, at_ms, before, begun_s, Passage(sent.source, sent.offset))

    def _recency(self, answer: Profile) -> int:
        return (answer.features or {}).get(self._feature, NEVER)

    def _look(self, user: str, at_ms: int, before: int, begun_s: float, passage: Passage) -> Passage:
        while True:
            asked_s = self._clock() - begun_s
            try:
                answer = self._loop.ask(user, at_ms)
            except ClientError as error:
                if asked_s > TIMEOUT_S or self._stopped():
                    return _unanswered(passage, error)
            else:
                took_s = self._clock() - begun_s
                passage = replace(passage, version=answer.version.number)
                if passage.feature_seconds is None and self._recency(answer) < before:
                    passage = replace(passage, feature_seconds=took_s)
                if passage.weight_seconds is None and self._learned(answer, passage):
                    passage = replace(passage, weight_seconds=took_s)
                if passage.feature_seconds is not None and passage.weight_seconds is not None:
                    return passage
            if asked_s > TIMEOUT_S or self._stopped():
                return _late(passage)
            self._sleep(POLL_S)

    @staticmethod
    def _learned(answer: Profile, passage: Passage) -> bool:
        return (answer.version.sources or {}).get(passage.source, 0) > passage.offset


def _unanswered(passage: Passage, error: ClientError) -> Passage:
    refused = isinstance(error, Refused) and error.status in (401, 403)
    return replace(passage, reason="refused" if refused else "answers", problem=f"no answer came: {error}")


def _late(passage: Passage) -> Passage:
    partition = passage.source.rpartition(":")[2]
    where = f"the click at offset {passage.offset} of partition {partition}"
    if passage.feature_seconds is None:
        return replace(
            passage,
            reason="features",
            problem=f"{where} is in no answer after {TIMEOUT_S:g} s: see whether it is a dead letter, and whether stream and "
            "applier run",
        )
    return replace(
        passage,
        reason="weights",
        problem=f"{where} was in answers after {passage.feature_seconds:.2f} s, and version {passage.version} has not learned "
        f"from it after {TIMEOUT_S:g} s: see whether it is pinned, or training is held",
    )


class Probe:
    """A stopwatch on a real loop. Each probe opens its own connections and uses the next probe user after `first`.

    `url` is the address of the serving API to probe; empty: serving on this host.
    """

    def __init__(self, settings: Settings, stop: threading.Event, first: int, url: str = "") -> None:
        self._settings, self._stop, self._number, self._url = settings, stop, first, url

    def time(self) -> Passage:
        """Times one click; connecting is not counted.

        Raises:
            SettingsError: The settings' clicks are not JSON, or the token or certificate cannot be read.
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

            loop, stop = ProbedLoop(send, ask), self._stop
            watch = Stopwatch(self._settings, loop, wall_ms, time.monotonic, stop.wait, stop.is_set)
            return watch.time(probe_user(self._number))

    def _client(self) -> Client:
        settings = self._settings
        address = serving_address(settings)
        token = tokens_in(settings.tokens_dir / READ)[0] if are_wanted(settings) else None
        return Client(
            self._url or address,
            timeout_s=ANSWER_S,
            retries=Retries(most=0),
            token=token,
            http=httpx.AsyncClient(verify=address.context() or True),
        )


def count(passage: Passage, metrics: ProbeMetrics, now_s: float) -> None:
    """Counts the result of a probe, also what it reached before it failed."""
    if passage.feature_seconds is not None:
        metrics.feature_seconds.observe(passage.feature_seconds)
    if passage.weight_seconds is not None:
        metrics.weight_seconds.observe(passage.weight_seconds)
    if passage.reason:
        metrics.failures.labels(passage.reason).inc()
    else:
        metrics.last_success.set(now_s)


def run(settings: Settings, stop: threading.Event, time_one: Callable[[], Passage], metrics: ProbeMetrics) -> None:
    """Sends a probe each `probe.every_s` until `stop`."""
    for reason in REASONS:
        metrics.failures.labels(reason)
    say, every_s = SaidOnce(_log.warning), settings.probe.every_s or EVERY_S
    while not stop.is_set():
        begun_s = time.monotonic()
        passage = time_one()
        if stop.is_set():
            return
        count(passage, metrics, time.time())
        if passage.reason:
            say(f"a probe did not come through ({passage.reason}); {passage.problem}")
        else:
            say.clear()
        stop.wait(max(0.0, begun_s + every_s - time.monotonic()))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command("springtide probe", _main, argv)


def _main(words: Sequence[str]) -> int:
    args, flags = parser_of("probe").parse_known_args(words)
    stop = stop_on_signals()
    # A failed attempt is reported once, with what failed; the client's own messages would repeat it.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    settings = load(flags)
    probe = Probe(settings, stop, random.randrange(SLOTS), args.url)
    if args.continuously:
        log_lines.begin("probe")
        log_lines.follow(settings.logs)
        logging.getLogger("httpx").setLevel(logging.WARNING)
        with served(settings.up.probe_port, settings.metrics.host) as registry:
            run(settings, stop, probe.time, ProbeMetrics(registry))
        return 0
    passage = probe.time()
    if args.output == "json":
        print(json.dumps(passage.to_json()))
    elif passage.reason:
        print(f"springtide probe: {passage}", file=sys.stderr)
    else:
        print(passage)
    return int(bool(passage.reason))


if __name__ == "__main__":
    sys.exit(main())
