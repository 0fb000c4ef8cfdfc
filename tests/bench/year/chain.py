"""The cores of every part in one process, one after another, under one clock that is set: click to answerable version.

clicks -> stream (parse, profile, cut, commit) -> micro-batches -> learner -> registry -> rows; micro-batches -> histories.
Logs are in memory; stores, registry and weights are the real ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry

from deploy.serving.following.clicks import HistoryFollower
from deploy.serving.following.versions import VersionFollower
from state.config.settings import Settings
from state.history.store import HistoryStore
from state.log import partition_of, topic_plan
from state.metrics import ApplierMetrics, TrainerMetrics
from state.process.environment import Clocks
from state.registry.control import start
from state.registry.registry import Registry
from state.rows.store import RowStore
from streaming.commit import Committer
from streaming.context import StreamContext, open_stream
from streaming.steps import ClickReader, Handle, ParseEvents, UpdateProfiles, opened
from tests.memory_log import MemoryLog
from tests.trainer.logs import settle
from trainer.compactor import compact, thin, tiers_of
from trainer.engine.step import Trainer
from trainer.learner import Learner, Surroundings
from trainer.publications import ServedModel
from trainer.versions import checkpoint
from trainer.versions.lowering import build

PARTITIONS = 4
MAP_BYTES = 1 << 32
LOOKS = 12
"""After each round of clicks, a second apart: enough to look at all that is kept, and less than a host has time for."""


@dataclass
class Clock:
    """What time it is.

    Attributes:
        ms: Since 1970.
    """

    ms: int

    def now_ms(self) -> int:
        """For who asks in milliseconds."""
        return self.ms

    def now_s(self) -> float:
        """For who asks in seconds."""
        return self.ms / 1000


class Stream:
    """The steps of the job, called one after another.

    Args:
        shard: What the process owns.
        clock: When rows are cut.
    """

    def __init__(self, shard: Handle[StreamContext], clock: Clock) -> None:
        self.context, self._clock = shard.context, clock
        self._clicks, self._parse, self._update = ClickReader(self.context), ParseEvents(shard), UpdateProfiles(shard)
        self._cutter, self._committer = self.context.cutter, Committer(self.context)

    def run(self) -> None:
        """Reads all clicks there are, and commits them."""
        while batches := self._clicks.poll(0.0):
            self._cutter.poll(self._clock.now_ms())
            for events in self._parse.process(batches):
                for rows in self._update.process(events):
                    for cut in self._cutter.add(rows, self._clock.now_ms()):
                        self._committer.commit([cut])
        for cut in self._cutter.flush(self._clock.now_ms()):
            self._committer.commit([cut])
        # What the commit thread does by and by, in seconds that pass here at once.
        sweep = self._committer._sweep
        while sweep.due_s is not None and sweep._sweeper is not None:
            sweep._sweeper.due_s = 0.0
            sweep.sweep()


class Serving:
    """The followers of one host.

    Args:
        settings: Of the whole system.
        log: Where micro-batches are.
        clock: What time it is.
    """

    def __init__(self, settings: Settings, log: MemoryLog, clock: Clock) -> None:
        self._settings, self._log, self._clock = settings, log, clock
        folder, metrics = settings.serving_dir, ApplierMetrics(CollectorRegistry())
        self.rows = RowStore.open_or_rebuild(folder / "rows", MAP_BYTES)
        self.histories = HistoryStore.open_or_rebuild(folder / "histories", settings.features.history, MAP_BYTES)
        self.versions = VersionFollower(self.rows, settings, metrics, clock.now_ms)
        self.clicks = HistoryFollower(self.histories, settings, metrics, clock.now_ms)

    def run(self) -> None:
        """Takes up all that is new, and forgets what is due."""
        topic = self._settings.kafka.microbatches_topic
        if not self.clicks.connected:
            self.clicks.connect(self._log, topic)
        while self.clicks.step(0.0):
            pass
        while self.versions.step():
            pass
        for _ in range(LOOKS):
            self._clock.ms += 1000
            self.clicks.step(0.0)
            self.versions.sweep()

    def close(self) -> None:
        """Closes the stores."""
        self.clicks.disconnect()
        self.rows.close()
        self.histories.close()


class Chain:
    """All parts, from an empty state directory on; a context manager.

    Args:
        settings: Of the whole system.
        start_ms: What time it is at first.
        load_bytes: Of deltas that may be read to load a version.
    """

    def __init__(self, settings: Settings, start_ms: int, load_bytes: int) -> None:
        self.settings, self.clock, self.load_bytes = settings, Clock(start_ms), load_bytes
        self.log = MemoryLog(settings.kafka, self.clock.now_ms)
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        topics, settings = self.log.topics(), self.settings
        topics.ensure(settings.kafka.clicks_topic, PARTITIONS, topic_plan.clicks(settings)[2])
        context = self._closing.enter_context(open_stream(settings, log=self.log))
        self.stream = Stream(self._closing.enter_context(opened(context)), self.clock)
        self.registry = Registry(settings.registry_dir)
        self.registry.propose(start(actor="bench", reason="a year", now_ms=self.clock.now_ms()))
        self.trainer = Trainer(settings, context.spec)
        self._program = build(self.trainer.ranker())
        self.learner = self._learner(context)
        self._closing.callback(self.learner.close)
        self.serving = Serving(settings, self.log, self.clock)
        self._closing.callback(self.serving.close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    def take(self, clicks: Iterable[tuple[int, bytes, bytes]], until_ms: int) -> None:
        """Time, key and value of clicks go all the way; then it is `until_ms`."""
        topic = self.settings.kafka.clicks_topic
        with self.log.writer() as writer:
            for at_ms, key, value in clicks:
                writer.send(topic, partition_of(key, PARTITIONS), key, value, (), at_ms)
        self.clock.ms = until_ms
        self.stream.run()
        while self.learner.tick(0.0):
            pass
        settle(self.learner)
        if self.learner.place.unsaved:
            self.learner.publish(last=True)
            settle(self.learner)
        self.serving.run()

    def end_day(self) -> None:
        """What is done now and then: the broker deletes what is too old, the compactor makes a base."""
        self.log.clean()
        compact(self.registry)
        tiers = replace(tiers_of(self.settings), load_bytes=self.load_bytes)
        thin(self.registry, tiers, self.clock.now_ms())

    def _learner(self, shard: StreamContext) -> Learner:
        settings = self.settings
        about = {"salt": shard.writer._encoding.salt, "popular": [], "newest_ms": self.clock.now_ms()}
        learner = Learner(
            settings,
            self.registry,
            self.trainer,
            self.log,
            ServedModel(
                self.registry.specs.add_program(self._program),
                shard.spec.digest,
                about,
                checkpoint.environment(settings, self.trainer.device, self.trainer.engine.name),
            ),
            TrainerMetrics(CollectorRegistry()),
            Surroundings(clocks=Clocks(self.clock.now_s, self.clock.now_s)),
        )
        control = self.registry.control()
        assert control is not None
        learner.enter(control)
        return learner
