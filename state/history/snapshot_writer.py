"""Writes snapshots of a store of histories; `state/history/snapshots.py` describes the format."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.disk import documents
from state.disk import files as durable
from state.errors import StoreFull
from state.features.spec import EVENT, Events
from state.file_store import FileStore
from state.history.chunks import EVENT_BYTES, Chunks, events_in
from state.history.rewinding import LINE
from state.history.snapshots import HistorySnapshot, Kind, SnapshotFile, UserRange, document_name, encode
from state.history.store import FORGOTTEN, LOADING, ForgottenUsers, StoreView
from state.log.follow import Position
from state.positions import Source, share_of
from state.process import killpoints
from state.registry.log_line import WHOLE, to_json
from state.user_shares import ALL, SHARES, UserShares

RANGE_BYTES, FILE_BYTES = 64 << 20, 1 << 20
"""The size of a range of users, and the minimum size of a file unless it holds all shares; before compression."""
REBASED, LEAST_GAIN = 2, 4
"""A snapshot rescans due ranges until these hold `REBASED` times the events of its delta. A range is due once the
deltas since its last scan have added a `LEAST_GAIN`th of its own events."""
MOST_DELTAS = 64
"""A range is also due after this many deltas since its last scan."""
MOST_GAINED = 8_000_000
"""The maximum number of events of a delta; a snapshot after more of them scans all users."""
_ENTRIES = 0xFFF
_KEY = np.dtype([("user", ">u8"), ("chunk", ">u4")])
_INVERT = np.uint32((1 << 32) - 1)
_USERS = 1 << 64


class Gained(NamedTuple):
    """Events added to a store, in order: `[m]` uint64 users and `[m]` EVENT, with the store's action numbers."""

    users: NDArray[np.uint64]
    events: Events

    @classmethod
    def joined(cls, parts: Sequence[Gained]) -> Gained:
        """Concatenates parts in order."""
        if not parts:
            return cls(np.empty(0, np.uint64), np.empty(0, EVENT))
        # As words, since concatenating structured arrays is slow.
        events = np.concatenate([part.events.view(np.int64) for part in parts]).view(EVENT)
        return cls(np.concatenate([part.users for part in parts]), events)


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """A consistent view of a store at one moment, from which a snapshot is written.

    Attributes:
        salt: Fingerprint of the salt of its users' pseudonyms.
        gained: The events added since `since`, in order; None to find them in the view.
        since: The snapshot on which this one builds; None to write all users.
    """

    view: StoreView
    position: Position
    salt: str
    gained: Sequence[Gained] | None
    since: HistorySnapshot | None


class SnapshotWriter:
    """Writes snapshots of one store. Not thread-safe.

    Args:
        name: The name of this process, as in `ErasureReport.part`.
        stopped: Polled between files; True aborts an incomplete snapshot.
    """

    def __init__(
        self,
        location: FileStore,
        name: str,
        history: int,
        shares: UserShares = ALL,
        most_bytes: int = 1 << 60,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._location, self._name, self._history, self._shares = location, name, history, shares
        self._most_bytes, self._stopped = most_bytes, stopped
        self._number, self._files = 0, list[SnapshotFile]()

    def write(self, cut: Cut, now_ms: int, after: int = 0) -> HistorySnapshot | None:
        """Writes a snapshot and closes the cut's view.

        It returns None if it was stopped or another process wrote a snapshot meanwhile. The snapshot's number is above
        `after` and above that of `cut.since`, even if the clock was set back.

        1. Write the gained events, the ranges that are due, and the extras.
        2. Create the document; the snapshot is then complete.

        Raises:
            StoreFull: The snapshot is larger than `most_bytes`.
            UnusablePlace: The location cannot be reached.
        """
        before, view, gained = cut.since, cut.view, cut.gained or ()
        self._number = max(now_ms, after + 1, before.number + 1 if before else 0)
        # 1.
        try:
            if before is not None and cut.gained is None:
                gained = self._gained_since(view, before.marks)
                if sum(len(part.users) for part in gained) > MOST_GAINED:
                    before, gained = None, ()
            self._files = [] if before is None else [file for file in before.files if file.kind != "extras"]
            due = [] if before is None else due_ranges(before, sum(len(part.users) for part in gained))
            if before is not None and len(due) < len(before.ranges):
                self._write_delta(Gained.joined(gained))
            ranges = self._write_ranges(view, before, due)
            known = {} if before is None else {file.sha256: file for file in before.files if file.kind == "extras"}
            self._write_extras(view, known)
            branch = view.extra(LINE)
            snapshot = HistorySnapshot(
                number=self._number,
                created_at_ms=now_ms,
                writer=self._name,
                history=self._history,
                held=str(self._shares),
                salt=cut.salt,
                topic_id=cut.position.topic_id,
                next=tuple(sorted(cut.position.next.items())),
                branch=to_json(WHOLE) if branch is None else json.loads(branch),
                sources={str(source): after for source, after in sorted(view.positions().items())},
                erased=ForgottenUsers.from_json(view.extra(FORGOTTEN)).through,
                users=view.users(),
                ranges=ranges,
                files=self._needed(ranges),
            )
        except _Stopped:
            return None
        finally:
            view.close()
        if snapshot.bytes > self._most_bytes:
            for file in self._files:
                if file.number == self._number:
                    self._location.remove(file.name)
            raise StoreFull(
                f"a snapshot of the histories takes {snapshot.bytes:,} bytes, and its share of the disk is {self._most_bytes:,}",
                "raise storage.budget_gb, or turn snapshots off with history.snapshot_every_s = 0",
            )
        killpoints.reach("snapshot.written")
        # 2.
        created = self._location.create(document_name(snapshot.number), documents.encode_sealed(snapshot))
        killpoints.reach("snapshot.named")
        return snapshot if created else None

    def _needed(self, ranges: Sequence[UserRange]) -> tuple[SnapshotFile, ...]:
        """The files that are still needed: neither bases of rescanned ranges, nor deltas that all bases contain."""
        bases, oldest = {(part.first_user, part.number) for part in ranges}, min(part.number for part in ranges)
        return tuple(
            file
            for file in self._files
            if file.kind == "extras"
            or (file.kind == "delta" and file.number > oldest)
            or (file.kind == "base" and (file.first_user, file.number) in bases)
        )

    def _gained_since(self, view: StoreView, marks: Mapping[Source, int]) -> list[Gained]:
        """The events that were appended at the offsets `marks` and later; incomplete beyond `MOST_GAINED`."""
        gained, count = list[Gained](), 0
        after = _by_partition(marks)
        for ends in view.ends():
            if self._stopped():
                raise _Stopped
            # Events are in append order, so a user without a new last event has no new event.
            users = np.array(ends.users, np.uint64)
            users = users[_are_since(after, users, ends.newest)]
            histories = [view.read_all(user) for user in users.tolist()]
            owners = np.repeat(users, [*map(len, histories)])
            events = np.concatenate([np.empty(0, EVENT), *histories]).astype(EVENT)
            new = _are_since(after, owners, events)
            gained.append(Gained(owners[new], events[new]))
            count += len(gained[-1].users)
            if count > MOST_GAINED:
                break
        return gained

    def _write_delta(self, gained: Gained) -> None:
        if not len(gained.users):
            return
        order = np.lexsort((gained.users, share_of(gained.users)))
        users = gained.users[order]
        # As words, since taking rows of a structured array is slow.
        events = gained.events.view(np.int64).reshape(len(users), -1)[order].view(EVENT).reshape(-1)
        starts = np.flatnonzero(np.concatenate(([True], users[1:] != users[:-1])))
        ends = np.append(starts[1:], len(users))
        for first_share, last_share, low, high in _by_share(users[starts], np.diff(ends, prepend=0)):
            file_events = events[starts[low] if low < high else 0 : ends[high - 1] if low < high else 0]
            lengths = (ends - starts)[low:high].astype(np.uint32)
            columns: Mapping[str, NDArray[Any]] = {"users": users[starts[low:high]], "lengths": lengths}
            self._put("delta", (first_share, last_share), 0, columns, file_events)

    def _write_ranges(
        self, view: StoreView, before: HistorySnapshot | None, due: Sequence[UserRange]
    ) -> tuple[UserRange, ...]:
        if before is None:
            return tuple(self._scan(view, 0, _USERS))
        firsts = [part.first_user for part in before.ranges]
        ranges: list[UserRange] = []
        for part, end in zip(before.ranges, [*firsts[1:], _USERS], strict=True):
            ranges += self._scan(view, part.first_user, end) if part in due else [part]
        return tuple(ranges)

    def _scan(self, view: StoreView, first: int, end: int) -> Iterator[UserRange]:
        """Writes the bases of the users `[first, end)`; yields one or more ranges of them."""
        # Joins and counts slice by slice, because work on a long list would block other threads.
        names, lengths, values, size = list[bytes](), list[NDArray[np.uint32]](), list[bytes](), 0
        for some in view.chunks_from(first):
            if over := int.from_bytes(some[-1][0][:8], "big") >= end:
                limit = end.to_bytes(8, "big")
                some = [entry for entry in some if entry[0] < limit]
            names.append(b"".join([key for key, _ in some]))
            lengths.append(np.fromiter((len(value) for _, value in some), np.uint32, len(some)) // EVENT_BYTES)
            values += [value for _, value in some]
            size += EVENT_BYTES * int(lengths[-1].sum())
            if over:
                break
            if size >= RANGE_BYTES:
                # The last user may have more chunks.
                named, counts = np.frombuffer(b"".join(names), _KEY), np.concatenate(lengths)
                count = int(np.searchsorted(named["user"], named["user"][-1]))
                yield self._write_base(first, named[:count], counts[:count], values[:count])
                first = int(named["user"][-1])
                names, lengths, values = [named[count:].tobytes()], [counts[count:]], values[count:]
                size = EVENT_BYTES * int(lengths[0].sum())
        named = np.frombuffer(b"".join(names), _KEY)
        yield self._write_base(first, named, np.concatenate([np.empty(0, np.uint32), *lengths]), values)

    def _write_base(
        self, first_user: int, named: NDArray[Any], lengths: NDArray[np.uint32], values: Sequence[bytes]
    ) -> UserRange:
        users, chunks = named["user"].astype(np.uint64), _INVERT - named["chunk"].astype(np.uint32)
        order = np.argsort(share_of(users), kind="stable")
        for first_share, last_share, low, high in _by_share(users[order], lengths[order]):
            in_file = order[low:high]
            columns = {"users": users[in_file], "chunks": chunks[in_file], "lengths": lengths[in_file]}
            events = events_in(b"".join([values[at] for at in in_file.tolist()]))
            self._put("base", (first_share, last_share), first_user, columns, events)
        return UserRange(first_user, self._number, int(lengths.sum()))

    def _write_extras(self, view: StoreView, known: Mapping[str, SnapshotFile]) -> None:
        """Writes counts and extras. Checksums of names decide where files end, so equal names give equal files."""
        some: Chunks = []
        for entries in view.counts_and_extras():
            for name, value in entries:
                if name != b"x:" + LOADING.encode():
                    some.append((name, value))
                if zlib.crc32(name) & _ENTRIES == 0:
                    self._put_extras(some, known)
                    some = []
        if some:
            self._put_extras(some, known)

    def _put_extras(self, entries: Chunks, known: Mapping[str, SnapshotFile]) -> None:
        columns = {"names": [name for name, _ in entries], "values": [value for _, value in entries]}
        self._put_encoded("extras", (0, SHARES - 1), 0, len(entries), encode(columns), known)

    def _put(
        self, kind: Kind, shares: tuple[int, int], first_user: int, columns: Mapping[str, NDArray[Any]], events: Events
    ) -> None:
        parts = {name: column.tobytes() for name, column in columns.items()}
        parts |= {name: np.ascontiguousarray(events[name]).tobytes() for name in EVENT.names or ()}
        data = encode(parts)
        self._put_encoded(kind, shares, first_user, len(events), data)

    def _put_encoded(
        self,
        kind: Kind,
        shares: tuple[int, int],
        first_user: int,
        events: int,
        data: bytes,
        known: Mapping[str, SnapshotFile] = {},
    ) -> None:
        if self._stopped():
            raise _Stopped
        digest = durable.digest(data)
        file = known.get(digest) or SnapshotFile(kind, self._number, shares, first_user, events, digest, len(data))
        if file.number == self._number:
            self._location.write(file.name, data)
            killpoints.reach("snapshot.file")
        self._files.append(file)


class _Stopped(Exception):
    """The process is stopping."""


def _by_partition(marks: Mapping[Source, int]) -> dict[tuple[int, int], NDArray[np.int64]]:
    """(Topic number, partition) -> the next offset by share of users, `[SHARES]` int64."""
    shares, by_partition = np.arange(SHARES), dict[tuple[int, int], NDArray[np.int64]]()
    for source, after in marks.items():
        by_share = by_partition.setdefault((source.topic, source.partition), np.zeros(SHARES, np.int64))
        is_in_bucket = shares % source.buckets == source.bucket
        by_share[is_in_bucket] = np.maximum(by_share[is_in_bucket], after)
    return by_partition


def _are_since(
    after: Mapping[tuple[int, int], NDArray[np.int64]], users: NDArray[np.uint64], events: Events
) -> NDArray[np.bool_]:
    """Which events (`[m]` EVENT) of `users` (`[m]` uint64) are at the offsets `after` or later, `[m]` bool."""
    is_since, shares = np.ones(len(events), np.bool_), share_of(users)
    for (topic, partition), by_share in after.items():
        is_of_partition = (events["topic"] == topic) & (events["partition"] == partition)
        is_since[is_of_partition] = events["offset"][is_of_partition] >= by_share[shares[is_of_partition]]
    return is_since


def due_ranges(before: HistorySnapshot, gained: int) -> list[UserRange]:
    """The ranges that a snapshot with `gained` new events rescans, the most overdue first."""
    deltas = [(file.number, file.events) for file in before.files if file.kind == "delta"]
    due, left = list[UserRange](), REBASED * gained
    for part in sorted(before.ranges, key=lambda part: part.number):
        since = [(number, events) for number, events in deltas if number > part.number]
        gain = (gained + sum(events for _, events in since)) / len(before.ranges)
        if LEAST_GAIN * gain < part.events and len({number for number, _ in since}) < MOST_DELTAS:
            break
        if due and left < part.events:
            break
        due.append(part)
        left -= part.events
    return due


def _by_share(users: NDArray[np.uint64], lengths: NDArray[Any]) -> Iterator[tuple[int, int, int, int]]:
    """Divides entries, ordered by share, into files: first and last share, and the entries `[low, high)`."""
    bounds = np.searchsorted(share_of(users), np.arange(SHARES + 1))
    sizes = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))[bounds] * EVENT_BYTES
    first = 0
    for share in range(SHARES):
        if share == SHARES - 1 or sizes[share + 1] - sizes[first] >= FILE_BYTES:
            if bounds[first] < bounds[share + 1]:
                yield first, share, int(bounds[first]), int(bounds[share + 1])
            first = share + 1
