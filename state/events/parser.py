"""Parses records of the clicks topic into columns of events, or into dead letters with a reason.

Validation is repeatable: a record is compared with its own Kafka timestamp, never with the current time, so reading the
log again gives the same events. The producer sets both of these times, or neither. So a quorum of users decides how far
an accepted time may affect other users (`streaming/event_clock.py`). The parser replaces users by pseudonyms; no raw
user id leaves it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from state.config.sections import Events as EventSettings
from state.errors import DecodeError, SettingsError
from state.events.decoding import (
    LATEST_MS,
    MILLISECONDS_FROM,
    MOST_EVENT_BYTES,
    DeadLetter,
    Reason,
    load_decoder,
    parse_time,
    reason_of,
)
from state.events.identity import Salt, context_id, context_text, is_probe_user, public_id, user_id
from state.positions import Range, Source

if TYPE_CHECKING:
    from state.log import PartitionBatch

CACHED_CONTEXTS = 200_000
ANNOUNCE_MS = 600_000
CACHED_IDS = 200_000
CACHED_CHARACTERS = 256  # longer texts are hashed each time, to bound the table
NAME_CHARACTERS = 200

_ID_TYPES = frozenset((str, int))
_OPTIONAL_ID_TYPES = _ID_TYPES | {type(None)}
_TOO_LONG = -1


@dataclass(frozen=True, slots=True, eq=False)
class EventBatch:
    """Events as columns, in order of arrival.

    Attributes:
        user: `[n]` uint64 pseudonyms.
        category: `[n]` uint64.
        action: `[n]` uint8, an index of the configured actions.
        at_ms: `[n]` int64, event time.
        label: `[n]` float32; NaN if unknown.
        weight: `[n]` float32, the weight of the action.
        context: `[n, K]` uint64; 0 for none.
        source: `[n]` uint16, an index of `ranges`.
        ranges: The positions read, with their outcomes.
        names: Id -> name, of the categories not announced within ten minutes of event time.
        item_names: Likewise for items, without names that are too long.
        request: `[n]` uint64 ids of requests, 0 for none; empty if no field is configured.
    """

    user: NDArray[np.uint64]
    item: NDArray[np.uint64]
    category: NDArray[np.uint64]
    action: NDArray[np.uint8]
    at_ms: NDArray[np.int64]
    label: NDArray[np.float32]
    weight: NDArray[np.float32]
    context: NDArray[np.uint64]
    source: NDArray[np.uint16]
    offset: NDArray[np.int64]
    ranges: tuple[Range, ...]
    dead: tuple[DeadLetter, ...]
    names: dict[int, str]
    item_names: dict[int, str] = field(default_factory=dict)
    request: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))

    def __len__(self) -> int:
        return len(self.user)

    def __bool__(self) -> bool:
        """Always True, because a batch without events still advances positions."""
        return True


class IdTable:
    """Ids by text, and the last time each text was announced. For one thread.

    Args:
        make: Computes the id of a text.
        announced: Whether `news` announces texts.
        whole: Whether texts longer than `NAME_CHARACTERS` are not announced; otherwise they are cut.
    """

    def __init__(self, make: Callable[[str | int], int], announced: bool = True, whole: bool = False) -> None:
        self._make, self._announced, self._whole = make, announced, whole
        self._forget()

    def _forget(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._texts: list[str] = []
        self._ids = np.empty(1024, np.uint64)
        self._announced_ms = np.empty(1024, np.int64)
        self._met: list[NDArray[np.int64]] = []
        # Texts by id, for long texts, which have no number.
        self._met_long: dict[int, str] = {}
        self._announced_long: dict[int, int] = {}

    def begin(self) -> None:
        """Starts a batch; a full table is cleared, and its texts are announced again."""
        if max(len(self._texts), len(self._announced_long)) >= CACHED_IDS:
            self._forget()

    def column(self, values: Sequence[Any]) -> NDArray[np.uint64]:
        """The ids of n values, `[n]` uint64; DecodeError if one is missing, of another type, or empty."""
        if not (kinds := {*map(type, values)}) <= _ID_TYPES:
            raise DecodeError(Reason.MISSING_FIELD if kinds <= _OPTIONAL_ID_TYPES else Reason.WRONG_TYPE)
        try:
            numbers = np.fromiter(map(self._numbers.get, values), np.int64, len(values))
            ids = self._ids[numbers]
        # `get` returns None for an unknown value.
        except TypeError:
            known = [self._numbers.get(value) for value in values]
            numbers = np.array(
                [self._add(value) if number is None else number for value, number in zip(values, known, strict=True)]
            )
            ids = self._ids[numbers]
            for row in np.flatnonzero(numbers == _TOO_LONG).tolist():
                ids[row] = self._make(values[row])
                if self._announced:
                    self._met_long[int(ids[row])] = str(values[row])
            numbers = numbers[numbers != _TOO_LONG]
        if self._announced:
            self._met.append(numbers)
        return ids

    def news(self, newest_ms: int) -> dict[int, str]:
        """Announces the texts seen since the last call that were not announced within `ANNOUNCE_MS`, and returns them.

        An earlier time also counts as distant. Otherwise one wrong clock would suppress the names for years.
        """
        met, self._met = np.concatenate([np.empty(0, np.int64), *self._met]), []
        due = met[np.abs(newest_ms - self._announced_ms[met]) >= ANNOUNCE_MS]
        self._announced_ms[due] = newest_ms
        texts = {int(self._ids[number]): self._texts[number] for number in dict.fromkeys(due.tolist())}
        if self._met_long:
            announced, long, self._met_long = self._announced_long, self._met_long, {}
            late = {
                identity: text
                for identity, text in long.items()
                if abs(newest_ms - announced.get(identity, -ANNOUNCE_MS)) >= ANNOUNCE_MS
            }
            announced.update(dict.fromkeys(late, newest_ms))
            texts |= late
        if self._whole:
            return {identity: text for identity, text in texts.items() if len(text) <= NAME_CHARACTERS}
        return {identity: text[:NAME_CHARACTERS] for identity, text in texts.items()}

    def _add(self, value: str | int) -> int:
        """Assigns a number to a value; `_TOO_LONG` for a text that is too long."""
        text = str(value)
        if not text:
            raise DecodeError(Reason.EMPTY_ID)
        if len(text) > CACHED_CHARACTERS:
            return _TOO_LONG
        number = self._numbers.get(text)
        if number is None:
            number = len(self._texts)
            if number == len(self._ids):
                self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
                self._announced_ms = np.concatenate((self._announced_ms, np.empty_like(self._announced_ms)))
            self._ids[number], self._announced_ms[number] = self._make(value), -ANNOUNCE_MS
            self._texts.append(text)
            self._numbers[text] = number
        # 7 and "7" have the same id.
        self._numbers[value] = number
        return number


_BAD = (DecodeError, ValueError, OverflowError)
_KINDS: dict[str, type] = {
    **dict.fromkeys(("user", "item", "category", "request", "context"), np.uint64),
    "at_ms": np.int64,
    "action": np.uint8,
    "label": np.float32,
}


def _each(convert: Callable[..., Any], rows: Sequence[int], refused: dict[int, Reason], *columns: Sequence[Any]) -> Any:
    """Converts columns at once or, if a value is invalid, row by row: leaves out invalid rows and adds them to `refused`."""
    try:
        return convert(*columns)
    except _BAD:
        converted = []
        for row, *values in zip(rows, *columns, strict=True):
            try:
                converted.append(convert(*([value] for value in values))[0])
            except _BAD as error:
                refused[row] = reason_of(error)
        return converted


class Parser:
    """Converts records to events by the settings of `[events]`. Not thread-safe.

    Its only state is caches and announced names.
    """

    def __init__(self, settings: EventSettings, salt: Salt) -> None:
        self._settings = settings
        self._salt = salt
        self._decode = load_decoder(settings)
        self._actions = {name: index for index, name in enumerate(settings.actions)}
        self._weights = np.array(settings.action_weights, np.float32)
        if len(self._weights) != len(self._actions):
            raise SettingsError(
                f"events.action_weights has {len(self._weights)} weights for {len(self._actions)} actions",
                "give one for each",
            )
        self._future_ms = round(settings.max_future_s * 1000)
        self._age_ms = round(settings.max_age_s * 1000)
        # A category's name is for display and may be cut. An item's name identifies the item and must not be cut.
        self._users = IdTable(partial(user_id, salt), announced=False)
        self._items, self._categories = IdTable(public_id, whole=True), IdTable(public_id)
        self._contexts: dict[tuple[str, str], int] = {}
        # In this order, the first invalid field of a record gives the reason.
        self._converters: dict[str, Callable[..., Any]] = {
            "at_ms": self._times,
            "user": lambda events: self._users.column([event.user for event in events]),
            "item": lambda events: self._ids(self._items, settings.item, [event.item for event in events], events),
            "category": lambda events: self._ids(
                self._categories, settings.category, [event.category for event in events], events
            ),
            "action": self._action_column,
            "label": lambda events: label_column([event.label for event in events]),
        }
        if settings.request:
            self._converters["request"] = self._requests
        if settings.context:
            self._converters["context"] = lambda events: [self._context(event) for event in events]

    def parse(self, batches: Sequence[PartitionBatch]) -> EventBatch:
        """Converts the result of one poll to events and dead letters, with the outcomes of every position."""
        for table in (self._users, self._items, self._categories):
            table.begin()
        refused = dict[int, Reason]()
        columns = self._columns(batches, refused)
        counts = np.bincount(columns["source"], minlength=len(batches)).tolist()
        refusals, begin = sorted(refused.items()), 0
        ranges: list[Range] = []
        dead: list[DeadLetter] = []
        for batch, count in zip(batches, counts, strict=True):
            source, end = Source(batch.topic_id, batch.partition), begin + len(batch)
            letters = [
                DeadLetter(source, int(batch.offsets[row - begin]), reason)
                for row, reason in refusals
                if begin <= row < end
            ]
            begin = end
            letters += [
                DeadLetter(source, lost, Reason.CORRUPT_RECORD)
                for first, after, _ in batch.corrupt
                for lost in range(first, after)
            ]
            outcomes = count, len(letters), batch.values.count(None)
            ranges.append(Range(source, batch.first, batch.next, *outcomes, batch.next - batch.first - sum(outcomes)))
            dead += letters
        newest_ms = int(columns["at_ms"].max()) if len(columns["at_ms"]) else None
        return EventBatch(
            **columns,
            weight=self._weights[columns["action"]],
            ranges=tuple(ranges),
            dead=tuple(dead),
            names={} if newest_ms is None else self._categories.news(newest_ms),
            item_names={} if newest_ms is None else self._items.news(newest_ms),
        )

    def _columns(self, batches: Sequence[PartitionBatch], refused: dict[int, Reason]) -> dict[str, NDArray[Any]]:
        """The columns of the events of all batches, one after another; adds the rows of records that are no events to
        `refused`.
        """
        values = [value for batch in batches for value in batch.values]
        numbers = np.repeat(np.arange(len(batches), dtype=np.uint16), [len(batch) for batch in batches])
        none = np.empty(0, np.int64)
        offsets = np.concatenate([none, *(batch.offsets for batch in batches)])
        timestamps_ms = np.concatenate([none, *(batch.timestamps_ms for batch in batches)])
        # Without a value, a record is a tombstone.
        rows: Sequence[int] = range(len(values))
        if None in values:
            rows = [row for row in rows if values[row] is not None]
        events = _each(
            self._decoded, rows, refused, values if len(rows) == len(values) else [values[row] for row in rows]
        )
        rows = [row for row in rows if row not in refused] if refused else rows
        kept: Any = slice(None) if len(rows) == len(values) else rows
        stamps_ms, found = timestamps_ms[kept], {"offset": offsets[kept], "source": numbers[kept]}
        for name, convert in self._converters.items():
            column = _each(convert, rows, refused, *((events, stamps_ms) if name == "at_ms" else (events,)))
            if len(column) < len(rows):
                good = [row not in refused for row in rows]
                rows, events = [*compress(rows, good)], [*compress(events, good)]
                found = {name: array[good] for name, array in found.items()}
            found[name] = np.asarray(column, _KINDS[name])
        requests = found.get("request", np.empty(0, np.uint64))
        contexts = found.get("context", np.empty(0, np.uint64)).reshape(len(rows), len(self._settings.context))
        return found | {"request": requests, "context": contexts}

    def _decoded(self, values: Sequence[bytes]) -> list[Any]:
        if max(map(len, values), default=0) > MOST_EVENT_BYTES:
            raise DecodeError(Reason.TOO_LARGE)
        return [self._decode(value) for value in values]

    def _times(self, events: list[Any], timestamps_ms: Sequence[int]) -> NDArray[np.int64]:
        times = [event.time for event in events]
        stamps_ms, unit, kinds = np.asarray(timestamps_ms, np.int64), self._settings.time_unit, {*map(type, times)}
        if type(None) in kinds and self._settings.time:
            raise DecodeError(Reason.MISSING_FIELD)
        if kinds == {int} and unit != "iso":
            # An integer of more than 64 bits is out of range, too.
            if not -LATEST_MS < min(times) <= max(times) < LATEST_MS:
                raise DecodeError(Reason.IMPLAUSIBLE_TIME)
            at_ms = np.array(times, np.int64)
            if unit != "ms":
                at_ms = np.where((at_ms < MILLISECONDS_FROM) | (unit == "s"), at_ms * 1000, at_ms)
        elif kinds == {type(None)}:
            at_ms = stamps_ms
        else:
            at_ms = np.array([parse_time(time, unit) for time in times], np.int64)
        after_ms = at_ms - stamps_ms
        # A record without a Kafka timestamp (-1) cannot be compared.
        plausible = (after_ms >= -self._age_ms) & (after_ms <= self._future_ms) | (stamps_ms < 0)
        if not (plausible & (at_ms >= 0) & (at_ms < LATEST_MS)).all():
            raise DecodeError(Reason.IMPLAUSIBLE_TIME)
        return at_ms

    def _ids(self, table: IdTable, configured: str, values: list[Any], events: list[Any]) -> NDArray[np.uint64]:
        """The ids of a column, `[n]` uint64; 0 for a missing value, allowed if no field is configured or for probe users."""
        if None not in values:
            return table.column(values)
        if configured and not all(
            is_probe_user(event.user) for event, value in zip(events, values, strict=True) if value is None
        ):
            raise DecodeError(Reason.MISSING_FIELD)
        ids = np.zeros(len(values), np.uint64)
        named = [row for row, value in enumerate(values) if value is not None]
        ids[named] = table.column([values[row] for row in named])
        return ids

    def _action_column(self, events: list[Any]) -> NDArray[np.uint8]:
        actions = [event.action for event in events]
        kinds = {*map(type, actions)}
        if kinds == {type(None)} and len(self._actions) == 1:
            return np.zeros(len(actions), np.uint8)
        if not kinds <= _ID_TYPES:
            raise DecodeError(Reason.MISSING_FIELD if kinds <= _OPTIONAL_ID_TYPES else Reason.WRONG_TYPE)
        numbers = [*map(self._actions.get, actions if kinds <= {str} else map(str, actions))]
        if None in numbers:
            raise DecodeError(Reason.UNKNOWN_ACTION)
        return np.array(numbers, np.uint8)

    def _requests(self, events: list[Any]) -> list[int]:
        """The ids of requests, 0 for none; they are not cached, since each occurs only a few times."""
        requests = [event.request for event in events]
        if not {*map(type, requests)} <= _OPTIONAL_ID_TYPES:
            raise DecodeError(Reason.WRONG_TYPE)
        return [0 if request is None or request == "" else public_id(request) for request in requests]

    def _context(self, event: Any) -> list[int]:
        ids = []
        for name, value in zip(self._settings.context, event.context, strict=True):
            if value is None or value == "":
                ids.append(0)
                continue
            if not isinstance(value, str | bool | int | float):
                raise DecodeError(Reason.WRONG_TYPE)
            if isinstance(value, float) and not math.isfinite(value):
                raise DecodeError(Reason.NOT_FINITE)
            key = name, context_text(value)
            ids.append(self._contexts.get(key) or self._new_context(key))
        return ids

    def _new_context(self, key: tuple[str, str]) -> int:
        identity = context_id(*key)
        if len(self._contexts) >= CACHED_CONTEXTS:
            self._contexts.clear()
        if len(key[1]) <= CACHED_CHARACTERS:
            self._contexts[key] = identity
        return identity


def label_column(labels: list[Any]) -> NDArray[np.float32]:
    """A column of labels, `[n]` float32 with NaN for None; DecodeError if a label is invalid."""
    unknown = labels.count(None)
    if unknown == len(labels):
        return np.full(unknown, np.nan, np.float32)
    if not {*map(type, labels)} <= {type(None), bool, int, float}:
        raise DecodeError(Reason.WRONG_TYPE)
    array = np.array([math.nan if label is None else label for label in labels], np.float64)
    # A label that is NaN or infinite fails one of the comparisons.
    if np.count_nonzero((array >= 0) & (array <= 1)) < len(array) - unknown:
        known = [label for label in labels if label is not None]
        raise DecodeError(Reason.WRONG_TYPE if all(map(math.isfinite, known)) else Reason.NOT_FINITE)
    return array.astype(np.float32)
