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
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.config.sections import Events as EventSettings
from state.errors import DecodeError, SettingsError
from state.events.dead_letters import MOST_EVENT_BYTES, DeadLetter, Reason, reason_of
from state.events.decoding import LATEST_MS, MILLISECONDS_FROM, load_decoder, parse_time
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


@dataclass(frozen=True, slots=True, eq=False)
class EventBatch:
    """Events as columns, in order of arrival.

    Attributes:
        user: `[n]` uint64 pseudonyms.
        item: `[n]` uint64.
        category: `[n]` uint64.
        action: `[n]` uint8, an index of the configured actions.
        at_ms: `[n]` int64, event time.
        label: `[n]` float32; NaN if unknown.
        weight: `[n]` float32, the weight of the action.
        context: `[n, K]` uint64; 0 for none.
        source: `[n]` uint16, an index of `ranges`.
        offset: `[n]` int64.
        ranges: The positions read, with their outcomes.
        dead: The records that could not become events.
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
        """The number of events."""
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
        self._met_singly: list[int] = []
        # Texts by id, for long texts, which have no number.
        self._met_long: dict[int, str] = {}
        self._announced_long: dict[int, int] = {}

    def begin(self) -> None:
        """Starts a batch; a full table is cleared, and its texts are announced again."""
        if max(len(self._texts), len(self._announced_long)) >= CACHED_IDS:
            self._forget()

    def column(self, values: Sequence[Any]) -> NDArray[np.uint64] | None:
        """The ids of n values, `[n]` uint64; None if they must be read one by one. DecodeError if a text is empty."""
        if not {*map(type, values)} <= _ID_TYPES:
            return None
        try:
            numbers = np.fromiter(map(self._numbers.get, values), np.int64, len(values))
        # `get` returns None for an unknown value.
        except TypeError:
            if any(value not in self._numbers and self._add(value) is None for value in values):
                return None
            numbers = np.fromiter(map(self._numbers.__getitem__, values), np.int64, len(values))
        if self._announced:
            self._meet(numbers)
        return self._ids[numbers]

    def id_of(self, value: str | int) -> int:
        """The id of one value; DecodeError if the text is empty."""
        number = self._numbers.get(value)
        if number is None:
            number = self._add(value)
        if number is None:
            identity = self._make(value)
            if self._announced:
                self._met_long[identity] = str(value)
            return identity
        if self._announced:
            self._met_singly.append(number)
        return int(self._ids[number])

    def news(self, newest_ms: int) -> dict[int, str]:
        """Announces the texts seen since the last call that were not announced within `ANNOUNCE_MS`, and returns them.

        An earlier time also counts as distant. Otherwise one wrong clock would suppress the names for years.
        """
        self._meet(np.empty(0, np.int64))
        met, self._met = np.concatenate(self._met), []
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

    def _meet(self, numbers: NDArray[np.int64]) -> None:
        if self._met_singly:
            self._met.append(np.array(self._met_singly, np.int64))
            self._met_singly = []
        self._met.append(numbers)

    def _add(self, value: str | int) -> int | None:
        """Assigns a number to a value; None for a text that is too long."""
        text = str(value)
        if not text:
            raise DecodeError(Reason.EMPTY_ID)
        if len(text) > CACHED_CHARACTERS:
            return None
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


class _Columns(NamedTuple):
    """The events of a partition batch, `[n]` each, and the outcomes of its other records."""

    kept: NDArray[np.int64] | slice
    user: NDArray[np.uint64]
    item: NDArray[np.uint64]
    category: NDArray[np.uint64]
    action: NDArray[np.uint8]
    at_ms: NDArray[np.int64]
    label: NDArray[np.float32]
    contexts: list[list[int]]
    requests: list[int]
    dead: list[DeadLetter]
    filtered: int


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

    def parse(self, batches: Sequence[PartitionBatch]) -> EventBatch:
        """Converts the result of one poll to events and dead letters, with the outcomes of every position."""
        for table in (self._users, self._items, self._categories):
            table.begin()
        parts: list[_Columns] = []
        ranges: list[Range] = []
        dead: list[DeadLetter] = []
        for batch in batches:
            source = Source(batch.topic_id, batch.partition)
            columns = self._at_once(batch) or self._one_by_one(batch, source)
            corrupt = [
                DeadLetter(source, lost, Reason.CORRUPT_RECORD, None, None)
                for first, after, _ in batch.corrupt
                for lost in range(first, after)
            ]
            outcomes = len(columns.user), len(columns.dead) + len(corrupt), columns.filtered
            ranges.append(Range(source, batch.first, batch.next, *outcomes, batch.next - batch.first - sum(outcomes)))
            dead += columns.dead + corrupt
            parts.append(columns)
        return self._batch(parts, [batch.offsets for batch in batches], tuple(ranges), tuple(dead))

    def _batch(
        self,
        parts: list[_Columns],
        offsets: Sequence[NDArray[np.int64]],
        ranges: tuple[Range, ...],
        dead: tuple[DeadLetter, ...],
    ) -> EventBatch:
        """Concatenates the columns of all partition batches, with their offsets, into one batch."""

        def joined(part: list[NDArray[Any]], kind: type) -> NDArray[Any]:
            return np.concatenate(part) if part else np.empty(0, kind)

        action = joined([part.action for part in parts], np.uint8)
        at_ms = joined([part.at_ms for part in parts], np.int64)
        rows = [len(part.user) for part in parts]
        newest_ms = int(at_ms.max()) if len(at_ms) else None
        contexts = [context for part in parts for context in part.contexts]
        return EventBatch(
            user=joined([part.user for part in parts], np.uint64),
            item=joined([part.item for part in parts], np.uint64),
            category=joined([part.category for part in parts], np.uint64),
            action=action,
            at_ms=at_ms,
            label=joined([part.label for part in parts], np.float32),
            weight=self._weights[action],
            context=np.array(contexts, np.uint64).reshape(sum(rows), len(self._settings.context)),
            source=np.repeat(np.arange(len(parts), dtype=np.uint16), rows),
            offset=joined([of_batch[part.kept] for of_batch, part in zip(offsets, parts, strict=True)], np.int64),
            ranges=ranges,
            dead=dead,
            names={} if newest_ms is None else self._categories.news(newest_ms),
            item_names={} if newest_ms is None else self._items.news(newest_ms),
            request=np.array([request for part in parts for request in part.requests], np.uint64),
        )

    def _at_once(self, batch: PartitionBatch) -> _Columns | None:
        """Parses a batch column by column; None if a record needs the slower `_one_by_one`."""
        settings, values = self._settings, batch.values
        if None in values or max(map(len, values), default=0) > MOST_EVENT_BYTES:  # type: ignore[arg-type]
            return None
        try:
            events = [self._decode(value) for value in values]  # type: ignore[arg-type]
            at_ms = self._times([event.time for event in events], batch.timestamps_ms)
            action = self._action_column([event.action for event in events])
            label = label_column([event.label for event in events])
            if at_ms is None or action is None or label is None:
                return None
            requests = [self._request(event.request) for event in events] if settings.request else []
            contexts = [self._context(event) for event in events] if settings.context else []
            user = self._users.column([event.user for event in events])
            if user is None:
                return None
            item = self._ids(self._items, settings.item, [event.item for event in events])
            if item is None:
                return None
            category = self._ids(self._categories, settings.category, [event.category for event in events])
        # `_one_by_one` finds the invalid record and its outcome.
        except (DecodeError, ValueError, OverflowError):
            return None
        if category is None:
            return None
        return _Columns(slice(None), user, item, category, action, at_ms, label, contexts, requests, [], 0)

    def _times(self, times: list[Any], timestamps_ms: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Event times in ms, `[n]` int64; None if one is implausible or missing."""
        unit, kinds = self._settings.time_unit, {*map(type, times)}
        if kinds == {int} and unit != "iso":
            at_ms = np.array(times, np.int64)
            if not ((at_ms > -LATEST_MS) & (at_ms < LATEST_MS)).all():
                return None
            if unit != "ms":
                at_ms = np.where((at_ms < MILLISECONDS_FROM) | (unit == "s"), at_ms * 1000, at_ms)
        elif kinds == {type(None)} and not self._settings.time:
            at_ms = timestamps_ms.astype(np.int64)
        else:
            at_ms = np.array([parse_time(time, unit) for time in times], np.int64)
        after_ms = at_ms - timestamps_ms
        plausible = (after_ms >= -self._age_ms) & (after_ms <= self._future_ms) | (timestamps_ms < 0)
        return at_ms if (plausible & (at_ms >= 0) & (at_ms < LATEST_MS)).all() else None

    def _action_column(self, actions: list[Any]) -> NDArray[np.uint8] | None:
        """The numbers of actions, `[n]` uint8; None if one is unknown."""
        kinds = {*map(type, actions)}
        if kinds == {type(None)} and len(self._actions) == 1:
            return np.zeros(len(actions), np.uint8)
        if not kinds <= {str, int}:
            return None
        numbers = [*map(self._actions.get, actions if kinds <= {str} else map(str, actions))]
        return None if None in numbers else np.array(numbers, np.uint8)

    def _ids(self, table: IdTable, configured: str, values: list[Any]) -> NDArray[np.uint64] | None:
        """The ids of a column, `[n]` uint64; None if one must be read separately."""
        if not configured and values.count(None) == len(values):
            return np.zeros(len(values), np.uint64)
        return table.column(values)

    def _one_by_one(self, batch: PartitionBatch, source: Source) -> _Columns:
        """Parses the records of a batch one at a time, each with its own outcome."""
        rows: list[tuple[int, int, int, int, int, float]] = []
        contexts: list[list[int]] = []
        requests: list[int] = []
        dead: list[DeadLetter] = []
        parsed: list[int] = []
        filtered = 0
        wide, paired = bool(self._settings.context), bool(self._settings.request)
        times = batch.timestamps_ms.tolist()
        for index, value in enumerate(batch.values):
            if value is None:
                filtered += 1
                continue
            try:
                if len(value) > MOST_EVENT_BYTES:
                    raise DecodeError(Reason.TOO_LARGE)
                event = self._decode(value)
                row = self._read(event, times[index])
                if paired:
                    request = self._request(event.request)
                if wide:
                    contexts.append(self._context(event))
            except (DecodeError, ValueError) as error:
                dead.append(DeadLetter(source, int(batch.offsets[index]), reason_of(error), batch.keys[index], value))
                continue
            rows.append(row)
            if paired:
                requests.append(request)
            parsed.append(index)
        user, item, category, action, at_ms, label = zip(*rows, strict=True) if rows else ((),) * 6
        return _Columns(
            np.array(parsed, np.int64),
            np.array(user, np.uint64),
            np.array(item, np.uint64),
            np.array(category, np.uint64),
            np.array(action, np.uint8),
            np.array(at_ms, np.int64),
            np.array(label, np.float32),
            contexts,
            requests,
            dead,
            filtered,
        )

    def _read(self, event: Any, timestamp_ms: int) -> tuple[int, int, int, int, int, float]:
        """Checks one event; returns user, item, category, action, time, label."""
        settings = self._settings
        at_ms = parse_time(event.time, settings.time_unit) if event.time is not None else self._no_time(timestamp_ms)
        # A record without a Kafka timestamp (-1) cannot be compared.
        if timestamp_ms >= 0 and not -self._age_ms <= at_ms - timestamp_ms <= self._future_ms:
            raise DecodeError(Reason.IMPLAUSIBLE_TIME)
        if not 0 <= at_ms < LATEST_MS:
            raise DecodeError(Reason.IMPLAUSIBLE_TIME)
        value = event.user
        if type(value) is not str and type(value) is not int:
            raise DecodeError(Reason.MISSING_FIELD if value is None else Reason.WRONG_TYPE)
        user = self._users.id_of(value)
        value = event.item
        if type(value) is not str and type(value) is not int:
            item = self._no_id(value, settings.item, event.user)
        else:
            item = self._items.id_of(value)
        value = event.category
        if type(value) is not str and type(value) is not int:
            category = self._no_id(value, settings.category, event.user)
        else:
            category = self._categories.id_of(value)
        action = self._actions.get(event.action) if type(event.action) is str else self._other_action(event.action)
        if action is None:
            raise DecodeError(Reason.UNKNOWN_ACTION)
        label = event.label
        if label is None:
            return user, item, category, action, at_ms, math.nan
        if not isinstance(label, bool | int | float):
            raise DecodeError(Reason.WRONG_TYPE)
        if not 0 <= label <= 1:
            raise DecodeError(Reason.WRONG_TYPE if math.isfinite(label) else Reason.NOT_FINITE)
        return user, item, category, action, at_ms, float(label)

    def _no_time(self, timestamp_ms: int) -> int:
        if self._settings.time:
            raise DecodeError(Reason.MISSING_FIELD)
        return timestamp_ms

    def _no_id(self, value: Any, configured: str, user: object) -> int:
        """The id 0 for a missing value. It is allowed only if no field is configured, or for a probe user."""
        if value is not None:
            raise DecodeError(Reason.WRONG_TYPE)
        if configured and not is_probe_user(user):
            raise DecodeError(Reason.MISSING_FIELD)
        return 0

    def _other_action(self, value: Any) -> int | None:
        if value is None:
            if len(self._actions) == 1:
                return 0
            raise DecodeError(Reason.MISSING_FIELD)
        if type(value) is not int:
            raise DecodeError(Reason.WRONG_TYPE)
        return self._actions.get(str(value))

    def _request(self, value: Any) -> int:
        """The id of an event's request; requests are not cached, since each occurs only a few times."""
        if value is None or value == "":
            return 0
        if type(value) is not str and type(value) is not int:
            raise DecodeError(Reason.WRONG_TYPE)
        return public_id(value)

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


def label_column(labels: list[Any]) -> NDArray[np.float32] | None:
    """A column of labels, `[n]` float32 with NaN for None; None if a label is invalid."""
    unknown = labels.count(None)
    if unknown == len(labels):
        return np.full(unknown, np.nan, np.float32)
    if not {*map(type, labels)} <= {type(None), bool, int, float}:
        return None
    array = np.array([math.nan if label is None else label for label in labels], np.float64)
    # A label that is NaN or infinite fails one of the comparisons.
    return array.astype(np.float32) if np.count_nonzero((array >= 0) & (array <= 1)) == len(array) - unknown else None
