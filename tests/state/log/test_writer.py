"""Writing to a real broker: what only its client can get wrong."""

from __future__ import annotations

import contextlib

import pytest

from state.config.sections import Kafka
from state.errors import FencedWriter, LogError
from state.log import Writer


def test_a_fenced_writer_is_told_so_also_by_its_next_send(clicks: str, settings: Kafka) -> None:
    """The client hears of it in its own thread, and wraps that error when it refuses what is sent later."""
    with (
        Writer(settings, f"tx-{clicks}") as first,
        Writer(settings, f"tx-{clicks}"),
        pytest.raises(FencedWriter, match="cannot write to topic"),
        first.transaction(),
    ):
        first.send(clicks, 0, b"k", b"zombie")
        with contextlib.suppress(FencedWriter):
            first.flush()
        first.send(clicks, 0, b"k", b"later")


def test_a_record_beyond_what_the_client_takes_is_refused_too(clicks: str, settings: Kafka) -> None:
    with Writer(settings) as writer, pytest.raises(LogError):
        writer.send(clicks, 0, b"k", b"x" * 20_000_000)
        writer.flush()
