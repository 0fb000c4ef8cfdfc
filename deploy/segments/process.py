"""Updates the members of each segment: `python -m deploy.segments.process`, `springtide segments run`.

It evaluates users who clicked at once, and all users periodically, because windows expire and versions learn without a
click of the user. After a change of control it evaluates all users at once. Each round (`SegmentKeeper.step`):

1. Read control, the mask and the pointer. After a rollback, a pin, a mask or an erasure all users are evaluated again,
   erased users first.
2. Mark the users as due whose clicks have reached this host's histories; they come from the training log's records.
3. Evaluate some of the due users, as a worker would answer for them now, and some users of the periodic pass.
4. Write each entry and exit to the topic, then to the store that workers read.
5. Once all erased users have left, rewrite the store without their bytes, and report it to the registry.
6. Periodically a child process lists lookalikes. If step 1 finds a change, all lists are removed.

Memberships (`Members`) are written in an order that survives a crash:

1. At the start, read the compacted topic from where this host's copy ends to the topic's end.
2. Send each change as a record. Once it is acknowledged, commit it to the copy.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from deploy.segments.judging import JudgedUser, ProfileJudge, open_host
from deploy.segments.lookalikes import LookalikeLists
from deploy.serving.answers.host import Host
from deploy.serving.answers.predictor import Predictor
from deploy.serving.following.clicks import position_of
from deploy.serving.host_files import CONTROL_NOTE, MASK_NOTE, name_of
from state.config.settings import Settings
from state.disk.files import HOST
from state.disk.lock import DirectoryLock
from state.errors import MicroBatchError, SettingsError, SpringtideError, of_disk
from state.features.mask import Mask
from state.features.spec import KERNELS as FEATURE_KERNELS
from state.history.store import HistoryStore
from state.kernels import Kernels
from state.layout import SEGMENTS, SEGMENTS_LOCK
from state.log import KERNELS, Log, PartitionBatch, Writer, topic_plan
from state.log.follow import Follower, Opening, Position, open_topic, read_to
from state.log.topic_plan import TRAINING_PARTITION
from state.metrics import SegmentMetrics, served
from state.microbatch.codec import decode
from state.process import killpoints
from state.process.environment import freeze_objects, run_in_background, wall_ms
from state.process.log_lines import SaidOnce
from state.process.part import run_part, stop_on_signals
from state.registry.hosts import ErasureReport, write_erasure_report
from state.segments import (
    Member,
    Membership,
    SegmentsPosition,
    SegmentStore,
    all_members,
    key_of,
    member_of,
    membership_of,
    segments_of,
    value_of,
)
from state.storage import SERVING, map_bytes

STALLED_S = 30.0
RECORDS_AT_ONCE = 64
MOST_WAITING = 500_000
"""Maximum of users who wait for the histories, 8 bytes each; above it all users are evaluated instead."""
AT_ONCE = 256
"""Users evaluated per round, due ones and those of the periodic pass each; about 70 ms."""
FETCH_S, SOON_S = 0.1, 0.01
MOST_DUE = 200_000
"""Maximum of due users, about 100 bytes each; above it all users are evaluated instead."""
SWEEP_S = 600.0  # in which every user is evaluated again, because windows expire without a click
RETRY_S = 1.0
_log = logging.getLogger(__name__)


class Members:
    """The memberships of the segments `names`: the only writer of topic and store. Not thread-safe."""

    def __init__(
        self, log: Log, topic: str, store: SegmentStore, names: Collection[str], metrics: SegmentMetrics
    ) -> None:
        self._kafka, self._topic, self._store, self._names = log, topic, store, names
        self._metrics = metrics
        self._writer: Writer | None = None

    def read_topic(self) -> None:
        """1. Applies the part of the topic that the store lacks; then removes members of segments that no longer exist.

        Raises:
            LogError: It cannot be read, or nothing came for half a minute.
            StoreFull: The store is full; its content does not change.
        """
        position = self._store.position()
        stored = None if position is None else Position(position.topic_id, position.next)
        reader, opening = open_topic(self._kafka, self._topic, stored=stored)
        with reader:
            begins = {partition: begin for partition, (begin, _) in opening.ends.items()}
            if position is None or not opening.resumed or position.next.keys() != begins.keys():
                position = SegmentsPosition(opening.topic_id, begins)
                self._store.restart_at(position)
                for partition, begin in begins.items():
                    reader.seek(partition, begin)
            for batches in read_to(
                reader, {partition: end for partition, (_, end) in opening.ends.items()}, stalled_s=STALLED_S
            ):
                for batch in batches:
                    position = SegmentsPosition(position.topic_id, {**position.next, batch.partition: batch.next})
                    self._store.commit(_changes(batch), position)
        for segment in self._store.sizes().keys() - {*self._names}:
            for page in all_members(self._store, segment):
                self._write({(segment, user): None for user, _ in page})
            _log.info("segment %s is no more: its members left", segment)
        self._show()

    def take(self, judged: Sequence[JudgedUser]) -> None:
        """2. Adds and removes members as judged; durable in the topic and visible to readers of the store when it returns.

        Raises:
            LogError: The topic cannot be written; call again with the same users.
            StoreFull: The store is full; its content does not change.
        """
        wanted = [(name, result) for result in judged for name in self._names]
        before = self._store.memberships([(name, result.user) for name, result in wanted])
        changes: dict[Member, Membership | None] = {}
        for (name, result), membership in zip(wanted, before, strict=True):
            is_member = name in result.segments
            if is_member != (membership is not None):
                changes[name, result.user] = Membership(result.at_ms, result.version) if is_member else None
        if changes:
            self._write(changes)
            self._show()

    def compact(self) -> None:
        """Removes the bytes of former members from the store's file; raises as `LmdbStore.compact`."""
        self._store.compact()

    def disconnect(self) -> None:
        """Closes the connection; the next change opens another."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, changes: Mapping[Member, Membership | None]) -> None:
        if self._writer is None:
            self._writer = self._kafka.writer()
        for member, membership in changes.items():
            self._writer.send(self._topic, None, key_of(member), value_of(membership))
        self._writer.flush()
        killpoints.reach("segments.written")
        self._store.commit(changes)

    def _show(self) -> None:
        sizes = self._store.sizes()
        for name in self._names:
            self._metrics.members.labels(name).set(sizes.get(name, 0))


def _changes(batch: PartitionBatch) -> dict[Member, Membership | None]:
    """Returns the memberships in records, the last one of each member; skips malformed records."""
    memberships: dict[Member, Membership | None] = {}
    for offset, key, value in zip(batch.offsets.tolist(), batch.keys, batch.values, strict=True):
        member = member_of(key)
        try:
            membership = membership_of(value)
        except ValueError:
            member = None
        if member is None:
            _log.warning("record %d of partition %d of the segments is left out", offset, batch.partition)
        else:
            memberships[member] = membership
    return memberships


class _Record(NamedTuple):
    """A record: the offset after it, and `[k]` uint64, its users."""

    next: int
    users: NDArray[np.uint64]


class ClickedUsers:
    """Follows the log from where the histories end. Not thread-safe.

    Attributes:
        missed: Whether unknown users clicked: at the start, and after a gap. The caller evaluates all users
            instead, and resets it.
    """

    def __init__(self, settings: Settings, log: Log, metrics: SegmentMetrics) -> None:
        topic, self._partition = settings.kafka.microbatches_topic, TRAINING_PARTITION
        self._metrics = metrics
        self._histories: HistoryStore | None = None
        self._log = Follower(log, topic, [self._partition], self._stored, opened=self._opened)
        self._waiting: deque[_Record] = deque()
        self.missed = True

    def take(self, histories: HistoryStore, timeout_s: float) -> list[int]:
        """Returns the users whose clicks reached the histories since the last call, each once; waits `timeout_s` for records.

        Raises:
            LogError: The log cannot be read; call again.
        """
        self._histories = histories
        for batch in self._log.poll(timeout_s, RECORDS_AT_ONCE):
            for offset, value in zip(batch.offsets.tolist(), batch.values, strict=True):
                self._meet(offset, value)
        self._metrics.lag_records.set(self._log.lag() + len(self._waiting))
        users: dict[int, None] = {}
        reached = self._reached(histories)
        while self._waiting and self._waiting[0].next <= reached:
            users.update(dict.fromkeys(self._waiting.popleft().users.tolist()))
        if sum(len(record.users) for record in self._waiting) > MOST_WAITING:
            self._waiting.clear()
            self.missed = True
        return list(users)

    @property
    def waits(self) -> bool:
        """Whether there are users whose clicks the histories do not have yet."""
        return bool(self._waiting)

    def disconnect(self) -> None:
        """Closes the connection; the next call opens another, where the histories end by then."""
        self._log.disconnect()

    def _stored(self) -> Position | None:
        return None if self._histories is None else position_of(self._histories)

    def _opened(self, opening: Opening) -> None:
        # The records that waited are read again.
        self._waiting.clear()
        self.missed = True

    def _meet(self, offset: int, value: bytes | None) -> None:
        try:
            self._waiting.append(_Record(offset + 1, np.unique(decode(value or b"", ("user", "source")).user)))
        except MicroBatchError as error:
            _log.warning("record %d of the training log is left out: %s", offset, error)

    def _reached(self, histories: HistoryStore) -> int:
        stored = position_of(histories)
        return 0 if stored is None else stored.next.get(self._partition, 0)


class UserSweep:
    """Chooses the users of the periodic pass: users with a history by pseudonym, then members without one.

    A pass spreads its work over `every_s`; a hurried pass takes only the time that it needs. Not thread-safe.

    Attributes:
        took_s: How long the last whole pass took; 0 before.
    """

    def __init__(
        self,
        histories: Callable[[], HistoryStore],
        store: SegmentStore,
        names: Collection[str],
        every_s: float,
        clock_s: Callable[[], float],
        at_once: int,
    ) -> None:
        self._histories, self._store, self._names = histories, store, names
        self._every_s, self._clock_s, self._at_once = every_s, clock_s, at_once
        self._pass: Iterator[list[int]] | None = None
        self._begun_s = self._due_s = clock_s()
        self._share_s = 0.0
        self.hurried, self.took_s = False, 0.0

    def hurry(self) -> None:
        """Begins a hurried pass now, in place of the running one."""
        self._pass, self.hurried = None, True

    def users(self) -> list[int]:
        """Returns the users to evaluate now; none if it is too early."""
        now_s = self._clock_s()
        if not self.hurried and now_s < self._due_s:
            return []
        if self._pass is None:
            self._pass, self._begun_s, self._due_s = self._walk(), now_s, now_s
            self._share_s = self._every_s / max(1, self._histories().users())
        users = next(self._pass, None)
        if users is None:
            self._pass, self.took_s = None, now_s - self._begun_s
            self._due_s = now_s if self.hurried else max(now_s, self._begun_s + self._every_s)
            self.hurried = False
            return []
        self._due_s = max(self._due_s + len(users) * self._share_s, now_s - self._every_s)
        return users

    def _walk(self) -> Iterator[list[int]]:
        following: int | None = 0
        while following is not None:
            ends = self._histories().ends(following, self._at_once)
            following = ends.following
            yield ends.users
        for name in self._names:
            for page in all_members(self._store, name, self._at_once):
                users = [user for user, _ in page]
                histories = self._histories().read_many(users)
                yield [user for user, events in zip(users, histories, strict=True) if not len(events)]


class SegmentKeeper:
    """Updates the segments of one deployment on one of its serving hosts. Not thread-safe.

    Args:
        predictor: Returns what answers on this host; its queries identify users by pseudonym.

    Raises:
        SettingsError: An expression is invalid.
        StoreError: The store of members cannot be opened.
    """

    def __init__(
        self,
        settings: Settings,
        predictor: Callable[[], Predictor],
        log: Log,
        metrics: SegmentMetrics,
        now_ms: Callable[[], int],
        clock_s: Callable[[], float],
    ) -> None:
        segments = segments_of(settings)
        self._settings, self._predictor, self._kafka = settings, predictor, log
        self._metrics, self._now_ms = metrics, now_ms
        self._path: Path = settings.serving_dir / SEGMENTS
        self._store = SegmentStore.open_or_rebuild(self._path, map_bytes(settings, SERVING, SEGMENTS, self._path))
        self._judge = ProfileJudge(segments)
        self._members = Members(log, settings.segments.topic, self._store, segments, metrics)
        self._clicked = ClickedUsers(settings, log, metrics)
        self._sweep = UserSweep(lambda: predictor().histories, self._store, segments, SWEEP_S, clock_s, AT_ONCE)
        self._lists = LookalikeLists(settings, clock_s)
        self._begun = False
        self._due: dict[int, None] = {}
        self._seen: tuple[bytes | None, int, int] = (None, 0, 0)
        # Erased users to evaluate, and the erasure that is complete after that; -1 before control was read.
        self._leaving: set[int] = set()
        self._erased, self._reported = -1, 0

    def step(self) -> None:
        """Runs one round; waits for clicks at most `FETCH_S` if there is nothing else to do.

        Raises:
            SpringtideError: A store or topic is unreachable; call again later.
            OSError: Likewise.
        """
        if not self._begun:
            with self._kafka.topics() as topics:
                topics.ensure(*topic_plan.segments(self._settings))
            self._members.read_topic()
            self._begun = True
        predictor = self._predictor()
        # 1.
        self._look(predictor)
        # 2.
        busy = bool(self._due) or self._sweep.hurried
        wait_s = 0.0 if busy else SOON_S if self._clicked.waits else FETCH_S
        self._due.update(dict.fromkeys(self._clicked.take(predictor.histories, wait_s)))
        if self._clicked.missed or len(self._due) > MOST_DUE:
            self._due = dict.fromkeys(self._leaving)
            self._clicked.missed = False
            self._sweep.hurry()
        # 3. 4.
        self._take(list(islice(self._due, AT_ONCE)))
        self._take(self._sweep.users())
        self._metrics.waiting.set(len(self._due))
        self._metrics.sweep_seconds.set(self._sweep.took_s)
        # 5.
        if self._erased > self._reported and not self._leaving:
            self._tell_erased()
        # 6.
        if not self._sweep.hurried and not self._leaving:
            self._lists.tick()

    def disconnect(self) -> None:
        """Closes the connections to the log; the next step opens others."""
        self._clicked.disconnect()
        self._members.disconnect()

    def close(self) -> None:
        """Closes the connections and the store of members."""
        self.disconnect()
        self._lists.close()
        self._store.close()

    def _look(self, predictor: Predictor) -> None:
        with predictor.reading() as reader:
            served, control = reader.served(), reader.note(CONTROL_NOTE)
            mask = reader.note(MASK_NOTE) if control != self._seen[0] else None
        if served is None:
            return
        seen_control, epoch, version = self._seen
        self._seen = (control, served.epoch, served.version)
        if (control, served.epoch) == (seen_control, epoch) and served.version >= version:
            return
        self._lists.drop()
        if control != seen_control:
            erased = Mask.from_bytes(mask or b"{}").erased
            if erased.last > self._erased:
                self._leaving.update(user for erasure in erased.after(max(self._erased, 0)) for user in erasure.users)
                self._due = dict.fromkeys(self._leaving) | self._due
                self._erased = erased.last
        self._sweep.hurry()

    def _take(self, users: list[int]) -> None:
        if not users:
            return
        # Get them each time: the stores may be reopened, and the old ones are closed then.
        self._members.take(self._judge.judge(self._predictor(), users))
        for user in users:
            self._due.pop(user, None)
            self._leaving.discard(user)

    def _tell_erased(self) -> None:
        self._members.compact()
        last, now_ms = self._erased, self._now_ms()
        part = name_of(self._path, "segments")
        write_erasure_report(
            self._settings.registry_dir, ErasureReport(part, HOST, str(self._path), last, last, 0, now_ms)
        )
        self._reported = last
        _log.info("erasure %d: users have left all segments", last)


def _require_segments(settings: Settings) -> None:
    if not segments_of(settings):
        raise SettingsError("[segments] names no segment: there is nothing to keep", 'write NAME = "EXPRESSION" there')


def run(settings: Settings, log: Log, registry: CollectorRegistry, stop: threading.Event) -> None:
    """Updates the segments until `stop` is set, which takes some tenths of a second.

    Raises:
        SettingsError: There are no segments, or an expression is invalid.
    """
    _require_segments(settings)
    metrics, say = SegmentMetrics(registry), SaidOnce(_log.warning)
    host: Host | None = None
    keeper: SegmentKeeper | None = None
    freeze_objects()
    try:
        while not stop.is_set():
            try:
                if host is None:
                    host = open_host(settings)
                if keeper is None:
                    keeper = SegmentKeeper(settings, host.predictor, log, metrics, wall_ms, time.monotonic)
                keeper.step()
                say.clear()
                metrics.failures_in_a_row.set(0)
            except SettingsError:
                raise
            except (SpringtideError, OSError) as error:
                say(f"{of_disk(error)}; members stay as they are, and it is tried again")
                metrics.failures_in_a_row.inc()
                if keeper is not None:
                    # After a reconnect it evaluates all users.
                    keeper.disconnect()
                stop.wait(RETRY_S)
    finally:
        for opened in (keeper, host):
            if opened is not None:
                opened.close()


def main(argv: list[str] | None = None) -> int:
    """Runs the keeper with the settings of `argv` until a signal; returns the exit code."""
    stop = stop_on_signals()
    return run_part("segments", lambda settings: _run(settings, stop), argv, _log)


def _run(settings: Settings, stop: threading.Event) -> None:
    run_in_background()
    _require_segments(settings)
    with (
        DirectoryLock(settings.serving_dir, SEGMENTS_LOCK),
        served(settings.up.segments_port, settings.metrics.host) as registry,
    ):
        Kernels(registry, _log, uses=[KERNELS, FEATURE_KERNELS]).prepare(stop.is_set)
        run(settings, Log(settings.kafka), registry, stop)


if __name__ == "__main__":
    sys.exit(main())
