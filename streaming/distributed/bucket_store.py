"""The in-memory store of one bucket: its users' histories and waiting rows, with the interface the stream expects.

It is built from the deltas that an engine stores, and depends on neither the engine nor LMDB. A snapshot has the same
form as a delta: it is the change to an empty store, in parts. An engine may return parts in another order, so each one
is numbered.

Actions in its events are numbered by the names met so far, as in `state.history.store`. So the setting of actions may
change between a savepoint and the next job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from state.errors import CorruptStore
from state.features.erased import Erased
from state.features.spec import EVENT, Events
from state.history.actions import ACTIONS, Numbering, numbered
from state.history.appends import Appends
from state.history.waiting import WaitingRows
from streaming.distributed.buckets import joined, pack, parted, unpack

FORMAT = 1
_NONE = -1  # the length of a removed value


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """One change to a bucket's store.

    Attributes:
        appends: New events by user.
        waiting: Rows that begin to wait, by key; None for a row whose wait ends.
        extra: Values of the owner to replace; None removes one.
    """

    appends: Appends = field(default_factory=Appends.none)
    waiting: Mapping[bytes, bytes | None] = field(default_factory=dict)
    extra: Mapping[str, bytes | None] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether it changes anything."""
        return bool(len(self.appends.events) or self.waiting or self.extra)


def encode(delta: Delta, number: int) -> bytes:
    """Encodes a delta; deltas are applied in the order of `number`."""
    appends = delta.appends
    keys, rows = [*delta.waiting], [*delta.waiting.values()]
    values = [*rows, *delta.extra.values()]
    arrays: dict[str, NDArray[Any]] = {
        "users": appends.users,
        "counts": appends.lengths,
        "events": np.frombuffer(appends.events.tobytes(), np.uint8),
        **{f"key.{name}": one for name, one in joined(keys).items()},
        **joined([value or b"" for value in values]),
    }
    arrays["lengths"] = np.array([_NONE if value is None else len(value) for value in values], np.int64)
    return pack({"format": FORMAT, "number": number, "extra": [*delta.extra]}, arrays)


def decode(value: bytes) -> tuple[int, Delta]:
    """Decodes the number and the delta that `encode` wrote.

    Raises:
        CorruptStore: A later release wrote it.
    """
    head, arrays = unpack(value)
    if head["format"] != FORMAT:
        raise CorruptStore(
            f"the state of a bucket has format {head['format']}, this release reads {FORMAT}",
            "resume the job with the release that wrote its savepoint",
        )
    lengths = arrays["counts"]
    appends = Appends(arrays["users"], np.cumsum(lengths) - lengths, lengths, arrays["events"].view(EVENT))
    keys = parted({name: arrays[f"key.{name}"] for name in ("lengths", "bytes")})
    gone = arrays["lengths"] == _NONE
    values = parted({"lengths": np.maximum(arrays["lengths"], 0), "bytes": arrays["bytes"]})
    told = [None if is_gone else one for one, is_gone in zip(values, gone.tolist(), strict=True)]
    return head["number"], Delta(
        appends,
        dict(zip(keys, told[: len(keys)], strict=True)),
        dict(zip(head["extra"], told[len(keys) :], strict=True)),
    )


PART_BYTES = 900_000  # of one part of a snapshot; engines handle values of several megabytes badly
_EVENT_BYTES = EVENT.itemsize

IsOld = Callable[[Events], NDArray[np.bool_]]
"""Maps `[m]` EVENT to `[m]` bool: which of them are old."""


class BucketStore:
    """The store of one bucket. Not thread-safe.

    Args:
        history: N, the number of events kept for a user.
    """

    def __init__(self, history: int) -> None:
        self._history = history
        self._events: dict[int, bytes] = {}
        self._waiting: dict[bytes, bytes] = {}
        self._extra: dict[str, bytes] = {}
        self._numbering = Numbering()

    def name_actions(self, actions: Sequence[str]) -> dict[str, bytes]:
        """Numbers the actions of the settings; returns the extra values to store."""
        self._numbering, extra = numbered(self.extra(ACTIONS), actions)
        self._extra |= extra
        return extra

    @property
    def users(self) -> int:
        """How many users have a history."""
        return len(self._events)

    def read_many(self, users: Sequence[int]) -> list[Events]:
        """The histories of several users, each `[m <= N]` EVENT in append order."""
        known, outwards = self._events, self._numbering.outwards
        return [outwards(np.frombuffer(known.get(user, b""), EVENT)) for user in users]

    def extra(self, name: str) -> bytes | None:
        """A named value of the store's owner; None if it is not set."""
        return self._extra.get(name)

    def waiting(self) -> Iterator[tuple[bytes, bytes]]:
        """The waiting rows as pairs of key and value, sorted by key."""
        return iter(sorted(self._waiting.items()))

    def waiting_values(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The rows under `keys`; None for a row that does not wait."""
        return [self._waiting.get(key) for key in keys]

    def waiting_rows(self) -> int:
        """How many rows wait."""
        return len(self._waiting)

    def inwards(self, appends: Appends) -> Appends:
        """Converts appends to the store's numbering of actions."""
        events = self._numbering.inwards(appends.events)
        return appends if events is appends.events else Appends(appends.users, appends.starts, appends.lengths, events)

    def take(self, delta: Delta) -> None:
        """Applies a delta; its events are already numbered by `inwards`."""
        appends, most = delta.appends, self._history * _EVENT_BYTES
        data, known = appends.events.tobytes(), self._events
        starts, ends = (appends.starts * _EVENT_BYTES), (appends.starts + appends.lengths) * _EVENT_BYTES
        for user, start, end in zip(appends.users.tolist(), starts.tolist(), ends.tolist(), strict=True):
            before = known.get(user)
            known[user] = (data[start:end] if before is None else before + data[start:end])[-most:]
        for key, value in delta.waiting.items():
            if value is None:
                self._waiting.pop(key, None)
            else:
                self._waiting[key] = value
        for name, said in delta.extra.items():
            if said is None:
                self._extra.pop(name, None)
            else:
                self._extra[name] = said

    def leave_old(self, is_old: IsOld) -> int:
        """Removes the leading old events of each user; returns how many users have none left.

        It removes only leading events: a history keeps the last N events, and which ones these are must not change.
        """
        users, lengths = [*self._events], np.array([len(one) for one in self._events.values()], np.int64)
        if not users:
            return 0
        fresh = ~is_old(np.frombuffer(b"".join(self._events.values()), EVENT))
        ends = np.cumsum(lengths // _EVENT_BYTES)
        # For each index, the index of the first event at or after it that is not old.
        places = np.where(fresh, np.arange(len(fresh)), len(fresh))
        following = np.minimum.accumulate(places[::-1])[::-1]
        starts = ends - lengths // _EVENT_BYTES
        kept = np.minimum(following[starts], ends)
        gone = 0
        for at in np.flatnonzero(kept > starts).tolist():
            user, left = users[at], int(ends[at] - kept[at])
            if left:
                self._events[user] = self._events[user][-left * _EVENT_BYTES :]
            else:
                del self._events[user]
                gone += 1
        return gone

    def newest(self) -> tuple[list[int], Events]:
        """All users, and the newest event of each, `[k]` EVENT."""
        tails = b"".join(one[-_EVENT_BYTES:] for one in self._events.values())
        return [*self._events], np.frombuffer(tails, EVENT)

    def evict(self, users: Sequence[int]) -> None:
        """Removes users; they are then unknown, as before their first click."""
        for user in users:
            del self._events[user]

    def forget(self, erased: Erased) -> list[bytes]:
        """Removes the events and waiting rows of erased users; returns the keys of these rows."""
        for user in erased.users:
            if (stored := self._events.get(user)) is not None:
                events = np.frombuffer(stored, EVENT)
                kept = events[~erased.events(events, user)]
                if len(kept):
                    self._events[user] = kept.tobytes()
                else:
                    del self._events[user]
        keys = WaitingRows(self).of_erased(erased)
        for key in keys:
            del self._waiting[key]
        return keys

    def snapshot(self) -> Iterator[Delta]:
        """Yields the whole content as deltas to an empty store, in parts of about `PART_BYTES`."""
        yield Delta(extra=dict(self._extra))
        users: list[int] = []
        size = 0
        for user, events in self._events.items():
            users.append(user)
            size += len(events)
            if size >= PART_BYTES:
                yield Delta(self._appends(users))
                users, size = [], 0
        if users:
            yield Delta(self._appends(users))
        rows: dict[bytes, bytes | None] = {}
        size = 0
        for key, value in self._waiting.items():
            rows[key] = value
            size += len(key) + len(value)
            if size >= PART_BYTES:
                yield Delta(waiting=rows)
                rows, size = {}, 0
        if rows:
            yield Delta(waiting=rows)

    def _appends(self, users: Sequence[int]) -> Appends:
        stored = [self._events[user] for user in users]
        lengths = np.array([len(one) // _EVENT_BYTES for one in stored], np.int64)
        events = np.frombuffer(b"".join(stored), EVENT)
        return Appends(np.array(users, np.uint64), np.cumsum(lengths) - lengths, lengths, events)
