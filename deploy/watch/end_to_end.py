"""Times one click's way through the whole loop: sent as any producer's, looked for in answers as any client's.

1. An answer before, which says that somebody answers, and when the user's last click was.
2. The click, acknowledged by Kafka at a position.
3. Answers, until the user's features show it, and until the version has learned from its position.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from springtide_client import ClientError, Profile, Refused
from state.config.settings import Settings
from state.errors import LogError, SettingsError

LOOK_S = 0.02
DECODER = "state.events.decoding:decode_json"
NEVER = 255


class Sent(NamedTuple):
    """Where a click lies: "topic id:partition" of the clicks, and its offset there."""

    source: str
    offset: int


@dataclass(frozen=True)
class Passage:
    """What became of a probe's click.

    Attributes:
        source: "topic id:partition" that it was sent to; empty where it was not.
        offset: Its offset; -1 where it was not sent.
        feature_seconds: From sending it until an answer's features showed it; None where none did.
        weight_seconds: From sending it until an answer's version had learned from it; None where none had.
        version: That version, or the one that answered last; 0 for none.
        reason: Why it did not come through: kafka, answers, refused, features, weights; empty where it did.
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
        """As JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """In words.

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
    """The action of probe clicks: the first that waits for no label, and is none.

    >>> action_of(Settings())
    'view'
    """
    later = {*settings.labels.impressions, *settings.labels.outcomes}
    return next((one for one in settings.events.actions if one not in later), settings.events.actions[0])


def click_of(user: str, at_ms: int, settings: Settings) -> bytes:
    """A click that names nothing but its user, as the settings' producers write one.

    Raises:
        SettingsError: Clicks are not JSON here.

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


class Stopwatch:
    """Sends clicks and times them. One thread.

    Args:
        settings: Of the loop.
        send: Sends a click of a user and returns where it lies, acknowledged.
        ask: Gives a profile with features and sources, of a user at a time.
        now_ms: The wall clock.
        clock: Monotonic seconds.
        sleep: Waits so many seconds.
        stopped: Whether to give up.
    """

    def __init__(
        self,
        settings: Settings,
        send: Callable[[str, bytes], Sent],
        ask: Callable[[str, int], Profile],
        now_ms: Callable[[], int],
        clock: Callable[[], float],
        sleep: Callable[[float], object],
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._settings, self._send, self._ask = settings, send, ask
        self._now_ms, self._clock, self._sleep, self._stopped = now_ms, clock, sleep, stopped
        self._feature = f"{action_of(settings)}.recency"

    def time(self, user: str) -> Passage:
        """Sends one click of a probe user and waits for it, at most `probe.timeout_s`.

        Raises:
            SettingsError: Clicks are not JSON here, or the tokens cannot be read.
        """
        at_ms = self._now_ms()
        click = click_of(user, at_ms, self._settings)
        # 1.
        try:
            before = self._recency(self._ask(user, at_ms))
        except ClientError as error:
            return _unanswered(Passage(), error)
        # 2.
        begun_s = self._clock()
        try:
            sent = self._send(user, click)
        except LogError as error:
            return Passage(reason="kafka", problem=f"the click could not be sent: {error}")
        # 3.
        return self._look(user, at_ms, before, begun_s, Passage(sent.source, sent.offset))

    def _recency(self, answer: Profile) -> int:
        return (answer.features or {}).get(self._feature, NEVER)

    def _look(self, user: str, at_ms: int, before: int, begun_s: float, found: Passage) -> Passage:
        values: dict[str, Any] = {}
        timeout_s = self._settings.probe.timeout_s
        while True:
            asked_s = self._clock() - begun_s
            try:
                answer = self._ask(user, at_ms)
            except ClientError as error:
                if asked_s > timeout_s or self._stopped():
                    return _unanswered(Passage(**{**asdict(found), **values}), error)
            else:
                took_s, values["version"] = self._clock() - begun_s, answer.version.number
                if "feature_seconds" not in values and self._recency(answer) < before:
                    values["feature_seconds"] = took_s
                if "weight_seconds" not in values and self._learned(answer, found):
                    values["weight_seconds"] = took_s
                if {"feature_seconds", "weight_seconds"} <= {*values}:
                    return Passage(**{**asdict(found), **values})
            if asked_s > timeout_s or self._stopped():
                return _late(Passage(**{**asdict(found), **values}), timeout_s)
            self._sleep(LOOK_S)

    @staticmethod
    def _learned(answer: Profile, found: Passage) -> bool:
        return (answer.version.sources or {}).get(found.source, 0) > found.offset


def _unanswered(found: Passage, error: ClientError) -> Passage:
    refused = isinstance(error, Refused) and error.status in (401, 403)
    return Passage(
        **{**asdict(found), "reason": "refused" if refused else "answers", "problem": f"no answer came: {error}"}
    )


def _late(found: Passage, timeout_s: float) -> Passage:
    partition = found.source.rpartition(":")[2]
    where = f"the click at offset {found.offset} of partition {partition}"
    if found.feature_seconds is None:
        said = f"{where} is in no answer after {timeout_s:g} s: see whether it is a dead letter, and whether stream and applier run"
        return Passage(**{**asdict(found), "reason": "features", "problem": said})
    said = (
        f"{where} was in answers after {found.feature_seconds:.2f} s, and version {found.version} has not learned from it "
        f"after {timeout_s:g} s: see whether it is pinned, or training is held"
    )
    return Passage(**{**asdict(found), "reason": "weights", "problem": said})
