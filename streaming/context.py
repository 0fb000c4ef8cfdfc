"""The resources that the steps of a job share in one process, and how a step reaches them.

Beam builds the steps of a job from pickles, and a store, a Kafka consumer or a thread cannot be pickled. So main opens
a context and the steps carry its `Handle`, a number that identifies it in the process that opened it. Each job is one
fused stage in that one process.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import apache_beam as beam

from state.config.settings import Settings
from state.events.parser import Parser
from state.features.mask import Mask
from state.features.spec import FeatureSpec
from state.history.store import HistoryStore
from state.log import Reader
from state.metrics import StreamMetrics
from state.storage.waiting import Room
from streaming.attributes import Join
from streaming.control import ControlWatch
from streaming.event_clock import EventClock
from streaming.labels import Labels
from streaming.profile import Profiler
from streaming.truncation import Leaders
from streaming.writer import ShardWriter


@dataclass(frozen=True, kw_only=True)
class JobContext:
    """What turns records into rows, in the stream and in the bootstrap.

    Attributes:
        settings: The effective settings.
        spec: The feature spec.
        store: Histories, positions and waiting impressions.
        parser: Parses records into events; used by the Beam thread only.
        profiler: Histories in memory; used by the Beam thread, and notified of commits by the commit thread.
        clock: The event clock; used by the Beam thread only.
        labels: Waiting impressions; None if none can wait. The Beam thread attributes, the commit thread looks up.
        mask: The clicks that are left out.
    """

    settings: Settings
    spec: FeatureSpec
    store: HistoryStore
    parser: Parser
    profiler: Profiler
    clock: EventClock
    labels: Labels | None
    mask: Mask = Mask.NONE


@dataclass(frozen=True, kw_only=True)
class StreamContext(JobContext):
    """All resources of one stream process; created by `open_shard`.

    Attributes:
        topic_id: The id of the topic of clicks.
        reader: Reads the clicks; used by the Beam thread only, except for `commit_group` and `leader_epoch`.
        leaders: Leader epoch of the newest click before each position; used by the commit thread only.
        writer: Writes micro-batches and dead letters; used by the commit thread only.
        metrics: Metrics of the process.
        room: Lets a commit wait for disk space; used by the commit thread only.
        join: Attributes of users and items; None if none are configured.
        closing: Callbacks that run, last in first out, before the above is closed.
        stopping: Set by a signal; no further poll begins then.
        watch: Control, as polled by the Beam thread; no further poll begins once it has changed.
    """

    topic_id: str
    reader: Reader
    leaders: Leaders
    writer: ShardWriter
    metrics: StreamMetrics
    room: Room
    join: Join | None
    closing: ExitStack
    stopping: threading.Event
    watch: ControlWatch


Context = TypeVar("Context", covariant=True)
Owned = TypeVar("Owned")


@dataclass
class _Open:
    context: Any
    failure: BaseException | None = field(default=None)


_open: dict[int, _Open] = {}
_numbers = itertools.count()


class Handle(Generic[Context]):
    """A picklable reference to a context that this process has open; steps of a job carry it.

    Args:
        number: Of `opened`.
    """

    def __init__(self, number: int) -> None:
        self._number = number

    @property
    def context(self) -> Context:
        """The context that the handle refers to."""
        found: Context = _open[self._number].context
        return found

    @contextmanager
    def watched(self) -> Iterator[Context]:
        """Yields the context, and records the first exception that leaves the block."""
        here = _open[self._number]
        try:
            yield here.context
        except Exception as error:
            here.failure = here.failure or error
            raise

    @contextmanager
    def as_raised(self) -> Iterator[None]:
        """Wraps the run of a job: re-raises the original exception that left a `watched` block of a step."""
        try:
            yield
        # Beam turns an exception of a step into a RuntimeError with the traceback as text.
        except RuntimeError as error:
            raise _open[self._number].failure or error from None


@contextmanager
def opened(context: Owned) -> Iterator[Handle[Owned]]:
    """Registers `context` for the block, and yields the handle by which the steps of a job reach it."""
    number = next(_numbers)
    _open[number] = _Open(context)
    try:
        yield Handle(number)
    finally:
        del _open[number]


class Step(beam.DoFn, Generic[Context]):
    """A step of a job that uses the process's context."""

    def __init__(self, handle: Handle[Context]) -> None:
        super().__init__()
        self.handle = handle
