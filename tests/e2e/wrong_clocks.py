"""A made-up stream some of whose clicks have wrong clocks, through the parts of the loop in one process.

A tick has three clicks in each of four partitions, all of one moment. Where a
click has a wrong clock it is the last of its partition's tick, so that what
the others say of the time is said before it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from deploy.serving.following.clicks import HistoryFollower
from state.config.sections import LabelSettings
from state.events.identity import Salt, public_id, user_id
from state.events.parser import Parser
from state.features.mask import Mask, always
from state.features.spec import FeatureSpec
from state.history.store import HistoryStore
from state.history.waiting import place_of
from state.log import PartitionBatch
from state.metrics import ApplierMetrics
from state.microbatch.batch import log_times
from state.microbatch.codec import decode
from streaming.cut import Cut, Encoding, encode_cut
from streaming.event_clock import EventClock, OffClock
from streaming.labels import Labels
from streaming.profile import Profiler
from tests.memory_log import MemoryLog
from tests.trainer.clicks import small_settings
from trainer.engine.step import Trainer
from trainer.intake import take_in

START_MS = 1_790_000_000_000
TICKS, TICK_MS, TICKS_A_BATCH, PARTITIONS = 360, 40_000, 6, 4
END_MS = START_MS + TICKS * TICK_MS
HOUR_MS = 3_600_000
TOPIC, LOG = "ab" * 16, "microbatches"
SALT = Salt(b"a salt for the tests")
SPEC = FeatureSpec(windows_s=(600, 1800, 3600), actions=("view", "impression", "click"))
SETTINGS = replace(
    small_settings(
        "--trainer.expire_s", "3600", "--events.actions", "view,impression,click", "--events.action_weights", "1,1,1"
    ),
    labels=LabelSettings(impressions=("impression",), outcomes=("click",), wait_s=600.0),
)
NO_TIMESTAMP = -1


@dataclass(frozen=True)
class MadeClick:
    """A click and its clock.

    Attributes:
        partition: Where it is.
        user: Whose it is.
        fields: Item, category and action.
        at_ms: When it happened.
        off_ms: By how much its clock is wrong.
        stamped: What its producer sets as Kafka timestamp: `clock`, or `none`.
    """

    partition: int
    user: str
    fields: Mapping[str, str]
    at_ms: int
    off_ms: int = 0
    stamped: str = "clock"


def world(seed: int) -> list[list[MadeClick]]:
    """The clicks of each tick, all with right clocks. Some users and items are only seen at first."""
    drawn, ticks = np.random.default_rng(seed), []
    for tick in range(TICKS):
        at_ms, clicks = START_MS + tick * TICK_MS, []
        for partition in range(PARTITIONS):
            users = drawn.choice(80, 3, replace=False) + (0 if tick < 150 else 60)
            for place, user in enumerate(users.tolist()):
                item = int(drawn.integers(0, 300)) + (1000 if tick < 90 else 2000 if tick < 200 else 3000)
                shown = {"item": f"item-{item}", "category": f"category-{item % 90}", "action": "view"}
                if place == 1:
                    shown = {
                        "item": f"hot-{user % 3}",
                        "category": "hot",
                        "action": str(drawn.choice(["impression", "click"])),
                    }
                elif place == 0:
                    shown = {"item": f"hot-{tick % 3}", "category": "hot", "action": "view"}
                clicks.append(MadeClick(partition, f"user-{partition}-{user}", shown, at_ms))
        ticks.append(clicks)
    return ticks


@dataclass
class Seen:
    """What a run left, of the users whose clocks are right.

    Attributes:
        refused: Partition and offset of each dead letter, and its reason.
        rows: By partition, place and own offset of a row, its bytes.
        waiting: After each batch, the rows that wait.
        histories: By user the stream's history, and what answers can see of serving's.
        clocks: Serving's event clock after each micro-batch.
        trained: After each step log time, and by table its ids and when they were seen.
        off: Clocks that were off.
        moved: Rows whose log time is not their own.
        swept: Events that serving's histories have swept.
    """

    refused: dict[tuple[int, int], str] = field(default_factory=dict)
    rows: dict[tuple[int, int, int], bytes] = field(default_factory=dict)
    waiting: list[dict[bytes, bytes]] = field(default_factory=list)
    histories: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)
    clocks: list[int] = field(default_factory=list)
    trained: list[Any] = field(default_factory=list)
    off: list[OffClock] = field(default_factory=list, compare=False)
    moved: int = field(default=0, compare=False)
    swept: int = field(default=0, compare=False)


class Loop:
    """Stream, trainer and serving over one log.

    Args:
        path: Of the stores.
        trainer: Cleared before.
        now: Wall clock in which the stream reads the clicks of a time.
        left_out: Partition and offset of clicks that are not there.
        apart: Users, items and categories of which nothing is compared.
    """

    def __init__(
        self,
        path: Path,
        trainer: Trainer,
        now: Callable[[int], int],
        left_out: Mapping[tuple[int, int], str],
        apart: Collection[str],
    ) -> None:
        self._now, self._left_out, self._trainer = now, left_out, trainer
        self._apart = {user_id(SALT, one) for one in apart} | {public_id(one) for one in apart}
        self._store = HistoryStore(path / "stream", SPEC.history, 1 << 28)
        self._parser, self._profiler = Parser(SETTINGS.events, SALT), Profiler(self._store, SPEC, 200)
        self._clock, self._labels = EventClock(self._store.extra), Labels(SETTINGS, self._store)
        self._log = MemoryLog()
        self._log.topics().ensure(LOG, 1)
        self._served = HistoryStore(path / "serving", SPEC.history, 1 << 28)
        self._wall_ms = 0
        self._follower = HistoryFollower(
            self._served,
            SPEC,
            1000 * SPEC.windows_s[-1] + 600_000,
            ApplierMetrics(CollectorRegistry()),
            lambda: self._wall_ms,
        )
        self._follower.connect(self._log, LOG)
        self._next, self._marks = [0] * PARTITIONS, dict[Any, int]()
        self._owners: dict[tuple[Any, int], int] = {}
        self.seen = Seen()

    def run(self, ticks: Sequence[Sequence[MadeClick]]) -> Seen:
        """Sends all ticks through."""
        self._trainer.clear()
        for first in range(0, len(ticks), TICKS_A_BATCH):
            clicks = [click for tick in ticks[first : first + TICKS_A_BATCH] for click in tick]
            self._wall_ms = self._now(clicks[-1].at_ms)
            for value in self._stream(clicks):
                with self._log.writer() as writer:
                    writer.send(LOG, 0, None, value)
                self._learn(value)
                while self._follower.step(0.0):
                    pass
                self.seen.clocks.append(self._follower.newest_ms)
        for user in {click.user for tick in ticks for click in tick}:
            number = user_id(SALT, user)
            if number not in self._apart:
                told, served = (store.read(number) for store in (self._store, self._served))
                self.seen.swept += len(told) - len(served)
                # Which of the events that nobody can see any more are swept depends on when the sweep comes by.
                seen = served["at_ms"] > self._follower.newest_ms - 1000 * SPEC.windows_s[-1]
                self.seen.histories[user] = (told.tobytes(), served[seen].tobytes())
        self._store.close()
        self._served.close()
        return self.seen

    def _stream(self, clicks: Sequence[MadeClick]) -> list[bytes]:
        events = self._parser.parse([self._records(clicks, partition) for partition in range(PARTITIONS)])
        self.seen.refused |= {(one.source.partition, one.offset): str(one.reason) for one in events.dead}
        told = self._clock.follow(events, events.ranges, self._wall_ms)
        self.seen.off += told.off
        rows = self._labels.attribute(replace(self._profiler.update(events), clock=told))
        found = self._labels.look_up([Cut((rows,), self._wall_ms)])
        values = encode_cut(found.cuts[0], Encoding(SPEC.digest, SALT.fingerprint, 4096, 900_000))
        self._store.commit(rows.appends, rows.batch.ranges, {**found.extra, **told.state}, found.waiting)
        self._profiler.committed(rows)
        for number, offset, user in zip(
            events.source.tolist(), events.offset.tolist(), events.user.tolist(), strict=True
        ):
            self._owners[events.ranges[number].source, offset] = user
        waiting = dict(self._store.waiting())
        self.seen.waiting.append(
            {key: value for key, value in waiting.items() if self._owners[place_of(key)] not in self._apart}
        )
        return values

    def _records(self, clicks: Sequence[MadeClick], partition: int) -> PartitionBatch:
        mine = [click for click in clicks if click.partition == partition]
        first = self._next[partition]
        self._next[partition] = after = first + len(mine)
        offsets = np.arange(first, after, dtype=np.int64)
        values = [
            None
            if (partition, offset) in self._left_out
            else json.dumps({"user": one.user, "time": one.at_ms + one.off_ms, **one.fields}).encode()
            for offset, one in zip(offsets.tolist(), mine, strict=True)
        ]
        stamps = [NO_TIMESTAMP if one.stamped == "none" else one.at_ms + one.off_ms for one in mine]
        return PartitionBatch(
            TOPIC, partition, first, after, offsets, np.array(stamps, np.int64), [b""] * len(mine), values
        )

    def _learn(self, value: bytes) -> None:
        whole = decode(value)
        self.seen.moved += int((log_times(whole) != whole.at_ms).sum())
        for row in range(len(whole)):
            if int(whole.user[row]) not in self._apart:
                place = whole.header.ranges[whole.source[row]].source.partition, int(whole.offset[row])
                said = b"".join(column[row].tobytes() for column in whole.columns.values())
                self.seen.rows[(*place, int(whole.opened[row]))] = said
        found = take_in(value, self._marks, always(Mask.NONE), SPEC.digest, SALT.fingerprint, "here")
        self._marks = found.marks
        self._trainer.step(found.batch)
        tables = {}
        for name in ("user", "item", "category"):
            state = self._trainer.tables[name].state()
            seen_ms = zip(state.ids.tolist(), state.last_seen_ms.tolist(), strict=True)
            tables[name] = {one: at_ms for one, at_ms in seen_ms if one not in self._apart}
        self.seen.trained.append((self._trainer.counters.log_ms, int(self._trainer.popular.state()["hour"]), tables))
