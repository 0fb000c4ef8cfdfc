"""Follows the micro-batch topic and applies each record exactly once to the host's histories.

It stores the items and names that a host has seen, and removes those that have not been seen for long.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from deploy.serving.following.parity import Parity
from deploy.serving.host_files import (
    CAUGHT_UP_EXTRA,
    CLOCK_EXTRA,
    DAY_MS,
    SEEN,
    ItemFeed,
    item_extra,
    item_value,
    name_extra,
)
from state.config.sections import HistorySettings
from state.config.settings import Settings
from state.errors import MicroBatchError, SaltMismatch, StoreFull, TruncatedLog
from state.features.erased import Erased
from state.features.mask import Mask
from state.features.spec import EVENT, Events, FeatureSpec
from state.history.appends import Appends, events_of, renumbered
from state.history.rewind import Before
from state.history.rewinding import LogToRead, OpenAt, Rewound, branch_of, rewind
from state.history.store import HistoryStore
from state.history.sweeping import Sweeper
from state.layout import GAPS
from state.log import Log, PartitionBatch
from state.log.accepted_gaps import Journal, left_out
from state.log.follow import Follower, Opening, Position
from state.log.topic_plan import TRAINING_PARTITION
from state.metrics import ApplierMetrics
from state.microbatch.batch import MicroBatch, erased_rows, happened, log_times, new_ranges, trim
from state.microbatch.codec import decode, decode_events
from state.positions import Range, Source
from state.process import killpoints
from state.registry.log_line import LogLine, counts, onward

ITEMS_REMEMBERED = 1_000_000
AT_ONCE = 500
KINDS = ("item:", "name:")
SPARE = 50  # a pass over a full store removes 1/SPARE of the limit more than necessary


def is_remembered(name: str) -> bool:
    """Whether an extra is one of an item or a name."""
    return name.removeprefix(SEEN).startswith(KINDS)


@dataclass
class _Kind:
    """The state of items or of names: an upper bound on their number, and what the next pass removes."""

    kept: Counter[int] = field(default_factory=Counter)
    count: int = 0
    before: int = 0
    more: int = 0

    def end(self, most: int) -> None:
        """Ends a pass: computes the day before which all entries are removed, and how many more of that day."""
        self.count, self.before, self.more = self.kept.total(), 0, 0
        going = self.count - most + most // SPARE if self.count > most else 0
        for day in sorted(self.kept):
            if going <= 0:
                break
            self.before, self.more = day, going
            going -= self.kept[day]
        self.kept.clear()

    def goes(self, day: int) -> bool:
        """Whether to remove an entry that was last seen on `day`."""
        if day == self.before and self.more:
            self.more -= 1
            return True
        return day < self.before


class Remembered:
    """The items and names in one host's histories. Used by the thread that commits to them.

    They are extras of the histories, committed with the clicks that contain them, each with the day of log time on which
    it was last seen. With each day a pass over all begins. It removes entries not seen for `keep_days` and, above the
    limit, those seen longest ago. An entry without a day, from an older release, counts as seen at the first pass.

    Args:
        keep_days: Entries that have not been seen for more days of log time are removed.
        most: The maximum number of items, and of names.
    """

    def __init__(self, store: HistoryStore, keep_days: int, most: int) -> None:
        self._store, self._keep_days, self._most = store, keep_days, most
        # Item to twice its category, plus 1 if the item has a name.
        self._known: dict[int, int] = {}
        self._today: set[int] = set()
        self._day = 0
        self._kinds = {kind: _Kind() for kind in KINDS}
        self._walk: tuple[int, str] | None = None
        self._walked_day = -1

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of items and names; they may be too high until the next pass has counted."""
        return {kind.rstrip(":"): self._kinds[kind].count for kind in KINDS}

    def news(self, events: Events, names: Mapping[int, str], clock_ms: int) -> dict[str, bytes]:
        """Returns the extras to commit with clicks: new or changed categories, names, and entries first seen today.

        `events` are `[m]` EVENT, and `names` are the names in their record, by id.
        """
        self._begin_day(clock_ms)
        day, extras = self._day.to_bytes(4, "big"), dict[str, bytes]()
        categories = dict(zip(events["item"].tolist(), events["category"].tolist(), strict=True))
        for item, category in categories.items():
            if not (item and category):
                continue
            known, text = self._known.get(item, 0), names.get(item)
            if known >> 1 != category or (text is not None and not known & 1):
                name = (self._store.extra(item_extra(item)) or b"")[8:] if text is None else text.encode()
                self._known[item] = category << 1 | bool(name)
                extras[item_extra(item)] = item_value(category, name)
                self._kinds["item:"].count += not known
            if item not in self._today:
                self._today.add(item)
                extras[SEEN + item_extra(item)] = day
        named = {*events["category"].tolist()}
        for identity, text in names.items():
            if categories.get(identity) and identity not in named:
                continue
            extras[name_extra(identity)] = text.encode()
            self._kinds["name:"].count += identity not in self._today
            self._today.add(identity)
            extras[SEEN + name_extra(identity)] = day
        return extras

    def forget(self) -> None:
        """Clears the in-memory caches, after a rewind of the store."""
        self._known.clear()
        self._today.clear()

    def sweep(self, clock_ms: int) -> int:
        """Scans a few hundred items or names, and removes those that are due; returns the number of removed entries."""
        self._begin_day(clock_ms)
        if self._walk is None:
            if self._walked_day == self._day and all(kind.count <= self._most for kind in self._kinds.values()):
                return 0
            self._walk, self._walked_day = (0, ""), self._day
        number, start = self._walk
        prefix = KINDS[number]
        removed, following = self._take(prefix, start)
        if following is not None:
            self._walk = number, following
            return removed
        self._kinds[prefix].end(self._most)
        self._walk = (number + 1, "") if number + 1 < len(KINDS) else None
        return removed

    def _take(self, prefix: str, start: str) -> tuple[int, str | None]:
        """Scans entries from `start`; returns the number of removed entries, and where to continue."""
        kind, changes = self._kinds[prefix], dict[str, bytes | None]()
        entries = self._store.extras(prefix, start, AT_ONCE + 1)
        following = entries[AT_ONCE][0] if len(entries) > AT_ONCE else None
        seen = dict(self._store.extras(SEEN + prefix, SEEN + start if start else "", AT_ONCE))
        removed = 0
        for name, _ in entries[:AT_ONCE]:
            stored = seen.get(SEEN + name)
            day = self._day if stored is None else int.from_bytes(stored, "big")
            if day < self._day - self._keep_days or kind.goes(day):
                changes |= {name: None, SEEN + name: None}
                identity = int(name.removeprefix(prefix), 16)
                self._known.pop(identity, None)
                self._today.discard(identity)
                removed += 1
                continue
            kind.kept[day] += 1
            if stored is None:
                changes[SEEN + name] = self._day.to_bytes(4, "big")
        if changes:
            self._store.commit(Appends.none(), (), changes)
        return removed, following

    def _begin_day(self, clock_ms: int) -> None:
        """Starts a new day of log time if it is due, and clears caches that are too large."""
        if clock_ms // DAY_MS != self._day or len(self._today) > ITEMS_REMEMBERED:
            self._day = clock_ms // DAY_MS
            self._today.clear()
        if len(self._known) > ITEMS_REMEMBERED:
            self._known.clear()


SALT_EXTRA = "salt"
POSITION_EXTRA = "microbatches"
RECORDS_AT_ONCE = 8  # between two polls of control and two rounds of maintenance
EVERY_MS = 1000
ITEMS_KEEP_D = 90  # of log time; an item or a name that no click has mentioned for longer is evicted
MAX_ITEMS = 1_000_000  # whose category is stored, and of names; those not seen for longest are evicted first
_log = logging.getLogger(__name__)


class Upkeep:
    """Sweeps a host's histories, items and names; used by the store's writing thread.

    `reach_ms` is the maximum age, relative to the newest event, of an event that still matters. `lose` is called when
    users whose events still count were removed.
    """

    def __init__(
        self,
        store: HistoryStore,
        reach_ms: int,
        settings: HistorySettings,
        metrics: ApplierMetrics,
        now_ms: Callable[[], int],
        lose: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._reach_ms, self._kept = store, reach_ms, settings
        self._metrics, self._now_ms, self._lose = metrics, now_ms, lose
        self.begin()

    def begin(self) -> None:
        """Restarts from the store's content, after a rollback or a refused commit."""
        self._remembered = Remembered(self._store, ITEMS_KEEP_D, MAX_ITEMS)
        self._feed = ItemFeed(self._store)
        self._sweeper = Sweeper(
            self._store, self._reach_ms, self._kept.max_users, elapsed=lambda: self._now_ms() / 1000
        )

    def news(self, events: Events, names: Mapping[int, str], clock_ms: int) -> dict[str, bytes | None]:
        """Returns the extras to commit with some clicks; see `Remembered.news` and `ItemFeed.news`."""
        extras = self._remembered.news(events, names, clock_ms)
        return extras | self._feed.news(events, clock_ms)

    def sweep(self, newest_ms: int) -> None:
        """Checks some users and items if due, and removes expired ones; log time 0 is unknown.

        Raises:
            StoreFull: There is not enough space to write. Nothing was changed.
        """
        if newest_ms:
            if self._sweeper.sweep(newest_ms).evicted:
                self._lose()
            self._remembered.sweep(newest_ms)

    def make_room(self, newest_ms: int) -> None:
        """Checks many users and items when the store is full, as far as possible without more space."""
        # Discard names and items whose commit failed.
        self._remembered.forget()
        self._feed = ItemFeed(self._store)
        self._lose()
        if newest_ms:
            with suppress(StoreFull):
                self._sweeper.hurry(newest_ms)

    def show(self) -> None:
        """Sets the gauges."""
        self._metrics.history_users.set(self._store.users())


class HistoryFollower:
    """Applies the micro-batch topic to the histories; used by one thread, the store's only writer.

    Args:
        actions: Returns the action names of a record by its feature spec; None for an unknown spec.
        own_salt: Fingerprint of this host's salt. Records with another salt before the first one with ours are skipped.

    Attributes:
        newest_ms: The store's event clock.
        away: Whether no broker of the topic is reachable.
        caught_up: Whether the topic was ever read to its end.
        positions: By partition of the log, where the histories end.
        committed: Called with the events of each commit, after it.
    """

    def __init__(
        self,
        store: HistoryStore,
        settings: Settings,
        metrics: ApplierMetrics,
        now_ms: Callable[[], int],
        actions: Callable[[str], Sequence[str] | None] = lambda spec: None,
        own_salt: str | None = None,
    ) -> None:
        self._store, self._erased = store, Erased.NOBODY
        self._accepted = Journal(settings.registry_dir / GAPS).accepted
        self._spec, self._named, self._own_salt = FeatureSpec.from_settings(settings), actions, own_salt
        self._reach_ms, self._kept = self._spec.reach_ms(settings.events), settings.history
        self._metrics, self._now_ms = metrics, now_ms
        self._log: Follower | None = None
        self.away = True
        self.positions: Mapping[int, int] = {}
        self._housekept_ms = 0
        self.committed: Callable[[Appends], None] = lambda appends: None
        self.begin()

    def begin(self) -> None:
        """Restarts from the store's content, after a snapshot was loaded into it."""
        store, metrics, now_ms = self._store, self._metrics, self._now_ms
        self._line, self._marks = branch_of(store), store.positions()
        self._parity = Parity(store, self._spec, self._reach_ms, metrics, now_ms)
        self._upkeep = Upkeep(store, self._reach_ms, self._kept, metrics, now_ms, self._parity.lose)
        salt = store.extra(SALT_EXTRA)
        self._salt, self._begun = self._own_salt if salt is None else salt.decode(), bool(self._marks)
        self.newest_ms = clock_of(store)
        self.caught_up = store.extra(CAUGHT_UP_EXTRA) is not None

    def connect(self, log: Log, topic: str) -> None:
        """Starts to read a topic at the position where the histories end.

        Raises:
            LogError: The log cannot be read.
        """
        self._log = Follower(log, topic, stored=lambda: position_of(self._store), opened=self._opened)
        self._log.connect()

    def _opened(self, opening: Opening) -> None:
        if opening.recreated:
            _log.warning(
                "the micro-batch topic was recreated (now %s); it is read from its beginning", opening.topic_id
            )
        for lost in opening.losses:
            (gap,) = lost.gaps
            if isinstance(lost, TruncatedLog):
                _log.error(
                    "%s; reading continues at %d, and rows that the histories have are left out", lost.what, gap.first
                )
            else:
                self._metrics.gap_positions.inc(gap.positions)
                _log.error("%s. Users' windows lack the lost events; raise kafka.retention_h", lost.what)
        stored = {} if opening.stored is None or opening.recreated else opening.stored.next
        if any(begin > stored.get(partition, 0) for partition, (begin, _) in opening.ends.items()):
            self._parity.lose()
        # Set it now, not at the next poll, so that readers that wait for the histories do not see the old lag.
        self._metrics.microbatch_lag_records.set(opening.unread)
        self._metrics.history_epoch.set(self._line[-1].epoch)
        self._set_away(False)
        self.positions = dict(opening.next)

    def follow_branch(self, line: LogLine, mask: Mask, open_at: OpenAt) -> bool:
        """Moves the histories to the log branch that control names; returns whether the branch changed.

        If it changed, they are disconnected: call `connect` again. `mask` has the clicks that are not read again.
        `open_at` opens the training log at an offset.

        Raises:
            GapError: The log no longer reaches back to the branch point.
            LogError: The broker refused.
            StoreFull: Nothing was changed.
        """
        self._erased, self._parity.mask = mask.erased, mask
        if line == self._line:
            return False
        rewound = self._rewind(line, mask, open_at)
        _log.info("epoch %d of the training log: %s", line[-1].epoch, rewound)
        self.disconnect()
        if rewound is not None and rewound.short:
            self._parity.lose()
        self._line, self._marks = line, self._store.positions()
        self._upkeep.begin()
        self.newest_ms = clock_of(self._store)
        return True

    def _rewind(self, line: LogLine, mask: Mask, open_at: OpenAt) -> Rewound | None:
        """Rewinds the store to the branch `line`, in one transaction with position, event clock and items' categories.

        An item that only masked clicks have named since the branch point gets its previous category back, or none until
        the next click if none is found nearby.
        """
        store, stored = self._store, position_of(self._store)
        # Restored histories have no position in the log. Their events may come from any position.
        at = None if stored is None else stored.next.get(TRAINING_PARTITION)

        def extra(offset: int, before: Before) -> dict[str, bytes | None]:
            nameless = [item_extra(item) for item in before.items if item not in before.categories]
            extras: dict[str, bytes | None] = {
                name: None for item_name in nameless for name in (item_name, SEEN + item_name)
            }
            for item, category in before.categories.items():
                extras[item_extra(item)] = item_value(category, (store.extra(item_extra(item)) or b"")[8:])
            if stored is not None and at is not None and at > offset:
                moved = {**stored.next, TRAINING_PARTITION: onward(line, offset)}
                extras[POSITION_EXTRA] = replace(stored, next=moved).to_json()
            if newest_ms := max((int(log_times(rows).max(initial=0)) for rows in before.latest), default=0):
                extras[CLOCK_EXTRA] = json.dumps({"event_ms": newest_ms, "accepted_ms": self._now_ms()}).encode()
            return extras

        return rewind(store, line, LogToRead(open_at, self._reach_ms, at), mask, extra)

    @property
    def connected(self) -> bool:
        """Whether there is a reader."""
        return self._log is not None and self._log.connected

    def disconnect(self) -> None:
        """Closes the reader; `connect` continues where the histories end."""
        self._set_away(True)
        if self._log is not None:
            self._log.disconnect()

    def _set_away(self, away: bool) -> None:
        self.away = away
        self._metrics.log_away.set(away)

    def step(self, timeout_s: float) -> int:
        """Applies what has arrived, waiting at most `timeout_s`; returns the number of records.

        Raises:
            GapError: Records were deleted before they were read; `disconnect` and `connect` again.
            LogError: The broker refused.
            SaltMismatch: The stream uses another salt than before.
            StoreFull: The records must be read again: `disconnect` and `connect`.
        """
        assert self._log is not None, "connect first"
        batches = self._log.poll(timeout_s, RECORDS_AT_ONCE)
        for batch in batches:
            try:
                # LMDB keeps as many pages in memory as its largest transaction ever changed.
                for record in batch.one_by_one():
                    self._take(record)
            except StoreFull:
                self._upkeep.make_room(self.newest_ms)
                raise
        self._keep_house(idle=not batches)
        self._upkeep.sweep(self.newest_ms)
        return sum(map(len, batches))

    def _take(self, batch: PartitionBatch) -> None:
        """Commits the records of one partition together."""
        for first, following, reason in batch.corrupt:
            self._metrics.unreadable_microbatches.inc()
            _log.error(
                "micro-batch topic, partition %d: positions [%d, %d) are corrupt: %s",
                *(batch.partition, first, following, reason),
            )
        marks = dict(self._marks)
        events: list[Events] = []
        users: list[np.ndarray[tuple[int], np.dtype[np.uint64]]] = []
        ranges: list[Range] = []
        names: dict[int, str] = {}
        newest_ms = 0
        for offset, value in zip(batch.offsets.tolist(), batch.values, strict=True):
            compares = self._parity.is_due
            batch_read = self._decode(
                value, Source(batch.topic_id, batch.partition), offset, decode if compares else decode_events
            )
            if batch_read is None or not counts(self._line, batch_read.header.log_epoch, offset):
                continue
            keep, after = trim(batch_read, marks)
            parts, missing = new_ranges(batch_read, marks)
            if missing:
                self._metrics.gap_positions.inc(missing)
                where = (offset, batch.partition, missing)
                _log.error("record %d of partition %d: %d positions before it are in no micro-batch", *where)
            self._parity.meet(batch_read.header.ranges, marks, missing)
            new_events = batch_read.take(happened(batch_read.kind) & keep & ~erased_rows(batch_read, self._erased))
            ranges.extend(parts)
            events.append(events_of(new_events, new_events.header.ranges))
            users.append(new_events.user)
            if compares:
                self._parity.compare(new_events, (batch.partition, offset), users, events)
            newest_ms = max(newest_ms, int(log_times(new_events).max(initial=0)))
            if batch_read.header.clocks and self.newest_ms > batch_read.header.created_ms + DAY_MS:
                # With release 0.1.0, one click could set the clock years ahead.
                self.newest_ms = 0
            names |= batch_read.header.names
            marks = after
        joined = np.concatenate([np.empty(0, EVENT), *events]).astype(EVENT)
        clock_ms = max(newest_ms, self.newest_ms)
        extra = self._upkeep.news(joined, names, clock_ms) | self._parity.news(clock_ms)
        if newest_ms > self.newest_ms:
            extra[CLOCK_EXTRA] = json.dumps({"event_ms": newest_ms, "accepted_ms": self._now_ms()}).encode()
        appends = Appends.of(np.concatenate(users), joined) if len(joined) else Appends.none()
        self._commit(batch, appends, ranges, extra)
        self.newest_ms = max(self.newest_ms, newest_ms)
        self._marks = marks

    def _decode(
        self, value: bytes | None, log: Source, offset: int, read: Callable[[bytes], MicroBatch]
    ) -> MicroBatch | None:
        """Returns the micro-batch, or None for a record that is not one, which does not stop serving."""
        try:
            decoded = read(value or b"")
        except MicroBatchError as error:
            self._metrics.unreadable_microbatches.inc()
            _log.error("record %d of partition %d is left out: %s", offset, log.partition, error)
            return None
        self._salt = self._salt or decoded.header.salt
        if decoded.header.salt != self._salt:
            if not self._begun or left_out(self._accepted(), log, offset):
                self._metrics.unreadable_microbatches.inc()
                return None
            raise SaltMismatch.between(f"record {offset} of partition {log.partition}", decoded.header.salt, self._salt)
        self._begun = True
        # If the spec of the record is unknown, its action numbers are taken as this host's.
        return renumbered(decoded, self._named(decoded.header.spec) or self._spec.actions, self._spec.actions)

    def _commit(
        self, batch: PartitionBatch, appends: Appends, ranges: Sequence[Range], extra: dict[str, bytes | None]
    ) -> None:
        following = onward(self._line, batch.next)
        positions = {**self.positions, batch.partition: following}
        assert self._log is not None, "connect first"
        reader = self._log.reader
        leaders = {partition: reader.leader_epoch(partition, at) for partition, at in positions.items()}
        epochs = {partition: epoch for partition, epoch in leaders.items() if epoch >= 0}
        extra[POSITION_EXTRA] = Position(batch.topic_id, positions, epochs).to_json()
        if self._salt is not None:
            extra[SALT_EXTRA] = self._salt.encode()
        killpoints.reach("follow.taken")
        self._store.commit(appends, ranges, extra)
        killpoints.reach("follow.committed")
        self.committed(appends)
        self.positions = positions
        if following != batch.next:
            reader.seek(batch.partition, following)
        self._metrics.history_rows.inc(int(appends.lengths[self._store.shares.has(appends.users)].sum()))

    def _keep_house(self, idle: bool) -> None:
        """Measures the lag and the store, once a second."""
        now_ms = self._now_ms()
        if 0 <= now_ms - self._housekept_ms < EVERY_MS and not (idle and not self.caught_up):
            return
        self._housekept_ms = now_ms
        assert self._log is not None, "connect first"
        lag = self._log.lag()
        self._metrics.microbatch_lag_records.set(lag)
        self._set_away(not self._log.reader.reachable())
        if not lag and not self.caught_up:
            self._store.commit(Appends.none(), (), {CAUGHT_UP_EXTRA: b"1"})
            self.caught_up = True
        self._upkeep.show()


def clock_of(store: HistoryStore) -> int:
    """Returns the store's event clock in milliseconds; 0 if it has none."""
    clock = store.extra(CLOCK_EXTRA)
    return 0 if clock is None else int(json.loads(clock)["event_ms"])


def position_of(store: HistoryStore) -> Position | None:
    """Returns the position in the micro-batch topic at which the histories end.

    It is None if nothing was read, or after a restore.
    """
    return Position.from_json(store.extra(POSITION_EXTRA))
