"""A small engine: it runs the real steps of the distributed job, keeps their state, and goes back to its checkpoint when told to.

Elements of one source reach a bucket in their order. A checkpoint is taken as
engines take it: what is on its way is delivered and bundles are finished, then
all state is kept. A crash takes the state back, and loses what is on its way
and every bundle that was not finished; what is in the log stays there.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from apache_beam.utils.timestamp import Timestamp

from streaming.distributed.account import Account, BundleReport, WriteBuckets
from streaming.distributed.bucket import decode, encode, stored
from streaming.distributed.steps import ReadPartitions, UpdateBuckets
from streaming.distributed.worker import JobPlan, worker_of


@dataclass
class OneValue:
    """A value of a key's state."""

    value: bytes | None = None

    def read(self) -> bytes | None:
        return self.value

    def write(self, value: bytes) -> None:
        self.value = value


@dataclass
class Values:
    """A bag of a key's state, which comes back in another order."""

    values: list[bytes] = field(default_factory=list)

    def read(self) -> Iterable[bytes]:
        return self.values[::-1]

    def add(self, value: bytes) -> None:
        self.values.append(value)

    def clear(self) -> None:
        self.values.clear()


class Again:
    """A timer of a key, which waits for nothing."""

    def __init__(self) -> None:
        self.is_set = False

    def set(self, at: Timestamp) -> None:
        self.is_set = True


@dataclass
class BucketState:
    """The state of one bucket."""

    head: OneValue = field(default_factory=OneValue)
    snapshot: Values = field(default_factory=Values)
    deltas: Values = field(default_factory=Values)


@dataclass
class Kept:
    """What a checkpoint keeps."""

    readings: dict[int, OneValue]
    buckets: dict[int, BucketState] = field(default_factory=dict)
    account: OneValue = field(default_factory=OneValue)


class Engine:
    """Runs the steps of a job whose worker is open; `sinks` tasks write, each the buckets of its number."""

    def __init__(self, plan: JobPlan, sinks: int = 1) -> None:
        self._sinks = sinks
        self._writers: list[WriteBuckets] = []
        self.now = Kept({one: OneValue() for one in range(plan.settings.stream.sources)})
        self._checkpoint = copy.deepcopy(self.now)
        self.ended: set[int] = set()
        self.begin(plan)

    def begin(self, plan: JobPlan) -> None:
        """Makes the steps; nothing is on its way."""
        self._plan = plan
        for one in self._writers:
            one.teardown()
        self._source, self._update = ReadPartitions(plan), UpdateBuckets(plan)
        self._writers = [WriteBuckets(plan) for _ in range(self._sinks)]
        for one in self._writers:
            one.start_bundle()
        self._on_the_way: dict[int, deque[bytes]] = {}

    def read(self, source: int) -> None:
        """One bundle of a source."""
        self._source.start_bundle()
        again = Again()
        for one in self._source.read(source, self.now.readings[source], again):
            bucket, value = one.value
            self._on_the_way.setdefault(bucket, deque()).append(value)
        if not again.is_set:
            self.ended.add(source)

    def deliver(self, bucket: int, most: int = 1 << 30) -> None:
        """Gives a bucket what is on its way to it."""
        waiting = self._on_the_way.get(bucket, deque[bytes]())
        state = self.now.buckets.setdefault(bucket, BucketState())
        while waiting and most:
            most -= 1
            for made in self._update.process((bucket, waiting.popleft()), state.head, state.snapshot, state.deltas):
                list(self._writers[bucket % self._sinks].process(made))

    def finish(self, sink: int) -> None:
        """Finishes the bundle of a writing task, whose account is told."""
        writer = self._writers[sink]
        for one in writer.finish_bundle():
            account = stored(self.now.account, Account)
            account.take_bundle(decode(one.value[1], BundleReport))
            self.now.account.write(encode(account))
        writer.start_bundle()

    def checkpoint(self) -> None:
        """Keeps all state as it is now."""
        for bucket in sorted(self._on_the_way):
            self.deliver(bucket)
        for sink in range(self._sinks):
            self.finish(sink)
        self._checkpoint = copy.deepcopy(self.now)

    def crash(self, plan: JobPlan | None = None) -> None:
        """Goes back to the checkpoint; with a plan its processes die too, and begin anew with that."""
        self.now = copy.deepcopy(self._checkpoint)
        self.ended.clear()
        self.begin(plan or self._plan)

    def close(self) -> None:
        """Closes what the steps opened."""
        for one in self._writers:
            one.teardown()
        worker_of(self._plan).close()
