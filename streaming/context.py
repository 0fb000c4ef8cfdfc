"""What the steps of a job share in one process, and how a step reaches it.

Beam builds the steps of a job from pickles, and a store, a Kafka consumer or a
thread cannot be pickled. So main opens a context and the steps carry its
`Handle`, a number by which they find it in the process that opened it. Each
job is one fused stage in that one process.
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
from state.log import LogReader
from state.metrics import StreamMetrics
from state.storage.waiting import Room
from streaming.attributes import Join
from streaming.desired import ControlWatch
from streaming.event_clock import EventClock
from streaming.labels import Labels
from streaming.leaders import Leaders
from streaming.profile import Profiler
from streaming.writer import ShardWriter


@dataclass(frozen=True, kw_only=True)
class JobContext:
    """What makes rows of records, in the stream as in the bootstrap.

    Attributes:
        settings: The effective settings.
        spec: The feature spec.
        store: Histories, positions and impressions that wait.
        parser: Records to events; used by the Beam thread only.
        profiler: Histories in memory; used by the Beam thread, told of commits by the thread that commits.
        clock: What time it is by the clicks; used by the Beam thread only.
        labels: Impressions that wait; None where none can. The Beam thread attributes, the one that commits looks up.
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
    """Everything that one stream process owns; made by `open_shard`.

    Attributes:
        topic_id: The id of the topic of clicks.
        reader: The clicks; used by the Beam thread only, but for `commit_group` and `leader_epoch`.
        leaders: Who wrote the newest click before each position; used by the commit thread only.
        writer: Micro-batches and dead letters; used by the commit thread only.
        metrics: What the process counts.
        room: Where a commit waits for room on the disk; used by the commit thread only.
        join: Attributes of users and items; None where none are configured.
        closing: What runs, last in first out, before the above is closed.
        stopping: Set by a signal: no further poll begins.
        watch: Control as the Beam thread sees it: where it has changed no further poll begins either.
    """

    topic_id: str
    reader: LogReader
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
    """A context that this process has open, as a step carries it; it survives Beam's pickling.

    Args:
        number: Of `opened`.
    """

    def __init__(self, number: int) -> None:
        self._number = number

    @property
    def context(self) -> Context:
        """What the handle stands for."""
        found: Context = _open[self._number].context
        return found

    @contextmanager
    def watched(self) -> Iterator[Context]:
        """The context; remembers the first exception that leaves the block."""
        here = _open[self._number]
        try:
            yield here.context
        except Exception as error:
            here.failure = here.failure or error
            raise

    @contextmanager
    def as_raised(self) -> Iterator[None]:
        """Around the run of a job: what left a `watched` block of a step leaves this one too, as it was raised."""
        try:
            yield
        # Beam turns an exception of a step into a RuntimeError with its traceback as text.
        except RuntimeError as error:
            raise _open[self._number].failure or error from None


@contextmanager
def opened(context: Owned) -> Iterator[Handle[Owned]]:
    """A handle by which the steps of a job find `context` in the block."""
    number = next(_numbers)
    _open[number] = _Open(context)
    try:
        yield Handle(number)
    finally:
        del _open[number]


class Step(beam.DoFn, Generic[Context]):
    """A step of a job that uses the process's context.

    Args:
        handle: Of the context.
    """

    def __init__(self, handle: Handle[Context]) -> None:
        super().__init__()
        self.handle = handle
