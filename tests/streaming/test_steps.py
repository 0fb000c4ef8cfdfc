"""The steps of the jobs: each is importable and takes the context of its process in the same way."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator

import apache_beam as beam
import numpy as np
import pytest

from state.config.sections import Events
from state.events.event_batch import EventBatch
from state.events.identity import Salt
from state.events.parser import Parser
from state.log import PartitionBatch
from streaming import pipeline
from streaming.context import Handle, Step, StreamContext, opened
from streaming.sample import ComputeWindows, ReadSample
from streaming.steps import ParseEvents
from tests.streaming.pieces import context_of

AT_MS = 1_700_000_000_000
STEPS = [getattr(pipeline, name) for name in ("ReadClicks", "ParseEvents", "UpdateProfiles", "WriteMicroBatches")] + [
    ReadSample,
    ComputeWindows,
]


def clicks(*values: bytes) -> PartitionBatch:
    """A batch of partition 0."""
    count = len(values)
    return PartitionBatch("ab" * 16, 0, 0, count, np.arange(count), np.full(count, AT_MS), [None] * count, [*values])


@pytest.fixture
def shard() -> Iterator[Handle[StreamContext]]:
    """A process that owns a parser and nothing else."""
    with opened(context_of(parser=Parser(Events(), Salt(b"s" * 32)))) as handle:
        yield handle


@pytest.mark.parametrize("step", STEPS)
def test_each_step_is_found_by_its_name_and_takes_its_context_first(step: type[Step[StreamContext]]) -> None:
    assert getattr(importlib.import_module(step.__module__), step.__qualname__) is step
    assert issubclass(step, Step)
    assert [*inspect.signature(step.__init__).parameters][:2] == ["self", "handle"]


def test_the_pipeline_is_made_of_these_steps(shard: Handle[StreamContext]) -> None:
    made = beam.Pipeline()
    pipeline.build(made, shard)
    found: list[type] = []

    class Visitor(beam.pipeline.PipelineVisitor):  # type: ignore[misc]
        def visit_transform(self, node: beam.pipeline.AppliedPTransform) -> None:
            if isinstance(node.transform, beam.ParDo):
                found.append(type(node.transform.fn))

    made.visit(Visitor())
    assert found == STEPS[:4]


def test_each_list_of_batches_becomes_one_batch_of_events(shard: Handle[StreamContext]) -> None:
    good = b'{"user": "u", "item": "i", "category": "c", "action": "view", "time": 1700000000000}'
    (events,) = ParseEvents(shard).process([clicks(good, b"{bad"), clicks(good)])
    assert (len(events), len(events.dead)) == (2, 1)


def test_an_empty_list_goes_on_so_that_the_sink_can_tell_the_time(shard: Handle[StreamContext]) -> None:
    (events,) = ParseEvents(shard).process([])
    assert isinstance(events, EventBatch)
    assert len(events) == 0
