"""Dead letters carry coordinates and a reason, and nothing of a user."""

from __future__ import annotations

from state.events.dead_letters import DeadLetter
from streaming.writer import letter_headers
from tests.streaming.pieces import ZERO


def test_a_dead_letter_never_carries_the_key() -> None:
    letter = DeadLetter(ZERO, 3, "undecodable", b"user-7", b"user-7")
    assert b"user-7" not in b"".join(value for _, value in letter_headers(letter))
