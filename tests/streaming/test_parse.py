"""The parsing step: hands each list of batches to the parser of the shard, and remembers what it raised."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from streaming.parse import ParseEvents
from streaming.shard import Shard, installed


def shard_with(parse: Any) -> Any:
    """A shard with only a parser."""
    shard: Any = SimpleNamespace(parser=SimpleNamespace(parse=parse), failure=None)
    shard.watch = lambda: Shard.watch(shard)
    return shard


def test_each_list_of_batches_becomes_one_batch_of_events() -> None:
    with installed(shard_with(lambda batches: ("events", tuple(batches)))):
        assert list(ParseEvents().process([1, 2])) == [("events", (1, 2))]


def test_an_empty_list_goes_on_so_that_the_sink_can_tell_the_time() -> None:
    with installed(shard_with(lambda batches: ("events", tuple(batches)))):
        assert list(ParseEvents().process([])) == [("events", ())]


def test_a_broken_parser_stops_the_stream() -> None:
    def broken(batches: object) -> object:
        raise ZeroDivisionError("decoder")

    with installed(shard_with(broken)) as shard:
        with pytest.raises(ZeroDivisionError):
            list(ParseEvents().process([1]))
        assert isinstance(shard.failure, ZeroDivisionError)
