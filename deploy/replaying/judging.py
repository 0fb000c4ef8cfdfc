"""Says before rows are sent which of them the stream refuses, why, and by which setting; stops where none is a click."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from deploy.replaying.sender import Piece
from state.config.sections import Events
from state.errors import DecodeError, SettingsError
from state.events.dead_letters import DeadLetter, Reason
from state.events.decoding import load_decoder, parse_time
from state.events.identity import Salt
from state.events.parser import Parser
from state.log import PartitionBatch
from state.recordings.rows import shown_reasons

ENOUGH_ROWS = 10  # so many refused rows and no click: something is wrong with all of them
TOO_OLD, TOO_NEW = "events.max_age_s", "events.max_future_s"


class Judge:
    """Says which records will be dead letters, by the parser that the stream runs.

    Args:
        events: The section `[events]`.
    """

    def __init__(self, events: Events) -> None:
        # What is dead does not depend on the salt, and nothing of what is parsed is kept.
        self._parser = Parser(events, Salt(b"only judges"))
        self._decode = load_decoder(events)
        self._events = events

    def judge(self, piece: Piece) -> dict[int, str]:
        """Row -> reason, with the setting that decides where one does."""
        count = len(piece)
        offsets = np.arange(count, dtype=np.int64)
        batch = PartitionBatch("0" * 32, 0, 0, count, offsets, piece.kafka_ms, list(piece.keys), list(piece.values))
        dead: tuple[DeadLetter, ...] = self._parser.parse([batch]).dead
        return {letter.offset: self._told(letter, int(piece.kafka_ms[letter.offset])) for letter in dead}

    def _told(self, letter: DeadLetter, kafka_ms: int) -> str:
        if letter.reason is not Reason.IMPLAUSIBLE_TIME or letter.value is None or kafka_ms < 0:
            return str(letter.reason)
        try:
            after_ms = parse_time(self._decode(letter.value).time, self._events.time_unit) - kafka_ms
        # A time that no setting could let pass.
        except DecodeError:
            return str(letter.reason)
        if after_ms > self._events.max_future_s * 1000:
            return f"{letter.reason} by {TOO_NEW}"
        return f"{letter.reason} by {TOO_OLD}" if after_ms < -self._events.max_age_s * 1000 else str(letter.reason)


def refuse_all_dead(refused: Mapping[int, str], count: int, oldest_s: float = 0.0) -> None:
    """Stops before the topic is filled with dead letters.

    Args:
        refused: Row -> reason, of the first rows.
        count: How many rows those are.
        oldest_s: How far the oldest of them lies before its Kafka timestamp.

    Raises:
        SettingsError: None of them is a click.
    """
    if count < ENOUGH_ROWS or len(refused) < count:
        return
    reasons = Counter(refused.values())
    ((most, _),) = reasons.most_common(1)
    if most.endswith(TOO_OLD):
        do = (
            f"they lie up to {oldest_s:,.0f} s before the newest row: raise {TOO_OLD}, here and for the stream, "
            "leave them out, or say --keep-time"
        )
    elif most.endswith(TOO_NEW):
        do = "their times are later than this machine's clock: look at both, and at events.time_unit"
    else:
        do = "correct [events] (fields, actions, time_unit, decoder), --columns or --constant"
    raise SettingsError(
        f"none of the first {count:,} rows is a click: {shown_reasons(reasons)}", f"{do}; nothing was sent"
    )
