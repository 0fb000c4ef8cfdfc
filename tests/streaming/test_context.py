"""How steps reach what their process owns, and how what they raise comes out of the job."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest

from state.config.sections import Events
from state.events.identity import Salt
from state.events.parser import Parser
from streaming.context import Handle, StreamContext, opened
from streaming.steps import ParseEvents
from tests.streaming.pieces import context_of


@pytest.fixture
def shard() -> Iterator[Handle[StreamContext]]:
    """A process that owns a parser and nothing else."""
    with opened(context_of(parser=Parser(Events(), Salt(b"s" * 32)))) as handle:
        yield handle


def test_a_handle_leads_to_the_same_context_from_a_pickle(shard: Handle[StreamContext]) -> None:
    (step,) = pickle.loads(pickle.dumps([ParseEvents(shard)]))
    assert step.handle.context is shard.context


def test_what_a_step_raises_leaves_the_job_as_it_was_raised(shard: Handle[StreamContext]) -> None:
    with pytest.raises(ZeroDivisionError, match="a decoder"), shard.as_raised():
        try:
            with shard.watched():
                raise ZeroDivisionError("a decoder")
        except ZeroDivisionError as error:
            raise RuntimeError("what Beam makes of it") from error


def test_a_failure_of_beam_itself_stays_what_it_is(shard: Handle[StreamContext]) -> None:
    with pytest.raises(RuntimeError, match="of its own"), shard.as_raised():
        raise RuntimeError("of its own")
