"""A click: records of the topic become columns of events, or dead letters with a reason.

Validation is repeatable: a record is compared with its own Kafka timestamp,
never with now, so that reading the log again gives the same events. The same
producer sets both times, or none: what a time that passes here may change for
other users, many of them decide (`streaming/witnesses.py`). Users become
pseudonyms here; no raw user id leaves the parser.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from state.config.sections import Events as EventSettings
from state.errors import DecodeError, SettingsError
from state.events.dead_letters import DeadLetter, Reason, reason_of
from state.events.decoding import LATEST_MS, load_decoder, parse_time
from state.events.event_batch import EventBatch
from state.events.identity import Salt, context_id, context_text, public_id, user_id
from state.events.probe_users import is_probe_user
from state.positions import Range, Source

if TYPE_CHECKING:
    from state.log import PartitionBatch

ANNOUNCE_MS = 600_000
CACHED_IDS = 200_000
CACHED_CHARACTERS = 256  # longer ids are hashed each time, so that the caches stay small
NAME_CHARACTERS = 200


def _remember(cache: dict[Any, int], key: Any, value: int) -> int:
    """Puts `value` into a cache that is emptied when it is full."""
    if len(cache) >= CACHED_IDS:
        cache.clear()
    if len(str(key)) <= CACHED_CHARACTERS:
        cache[key] = value
    return value


class _Names:
    """Which texts of ids were not announced lately.

    Args:
        whole: Leaves out those that are too long, where others are cut.

    Attributes:
        met: Of this batch, by id.
    """

    def __init__(self, whole: bool = False) -> None:
        self._whole = whole
        self.met: dict[int, Any] = {}
        self._announced: dict[int, int] = {}

    def news(self, newest_ms: int) -> dict[int, str]:
        """Those of this batch; announces them.

        A time that goes back is another time too: one wrong clock must not silence the names for years.
        """
        met, self.met = self.met, {}
        announced = self._announced
        due = [key for key in met if abs(newest_ms - announced.get(key, -ANNOUNCE_MS)) >= ANNOUNCE_MS]
        if len(announced) >= CACHED_IDS:
            announced.clear()
        announced.update(dict.fromkeys(due, newest_ms))
        texts = {key: str(met[key]) for key in due}
        if self._whole:
            return {key: text for key, text in texts.items() if len(text) <= NAME_CHARACTERS}
        return {key: text[:NAME_CHARACTERS] for key, text in texts.items()}


class Parser:
    """Turns records into events. Used by one thread; remembers only caches and announced names.

    Args:
        settings: The section `[events]`.
        salt: What users' pseudonyms are made with.
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
        self._users: dict[Any, int] = {}
        self._public: dict[Any, int] = {}
        self._contexts: dict[tuple[str, str], int] = {}
        # What names a category to people may be cut; what names an item to its owner may not.
        self._categories, self._items = _Names(), _Names(whole=True)

    def parse(self, batches: Sequence[PartitionBatch]) -> EventBatch:
        """Turns what one poll found into events, dead letters and the account of every position.

        Args:
            batches: Contiguous ranges of partitions with their records.
        """
        rows: list[tuple[int, int, int, int, int, float]] = []
        contexts: list[list[int]] = []
        requests: list[int] = []
        dead: list[DeadLetter] = []
        ranges: list[Range] = []
        sources: list[int] = []
        offsets: list[NDArray[np.int64]] = []
        read, limit, wide = self._read, self._settings.max_event_bytes, bool(self._settings.context)
        paired = bool(self._settings.request)
        for number, batch in enumerate(batches):
            source = Source(batch.topic_id, batch.partition)
            kept: list[int] = []
            filtered, dead_before = 0, len(dead)
            times = batch.timestamps_ms.tolist()
            for index, value in enumerate(batch.values):
                if value is None:
                    filtered += 1
                    continue
                try:
                    if len(value) > limit:
                        raise DecodeError(Reason.TOO_LARGE)
                    event = self._decode(value)
                    row = read(event, times[index])
                    if paired:
                        request = self._request(event.request)
                    if wide:
                        contexts.append(self._context(event))
                except (DecodeError, ValueError) as error:
                    dead.append(
                        DeadLetter(source, int(batch.offsets[index]), reason_of(error), batch.keys[index], value)
                    )
                    continue
                rows.append(row)
                if paired:
                    requests.append(request)
                kept.append(index)
            for first, after, _ in batch.corrupt:
                dead += [DeadLetter(source, lost, Reason.CORRUPT_RECORD, None, None) for lost in range(first, after)]
            outcomes = len(kept), len(dead) - dead_before, filtered
            absent = batch.next - batch.first - sum(outcomes)
            ranges.append(Range(source, batch.first, batch.next, *outcomes, absent))
            sources += [number] * len(kept)
            offsets.append(batch.offsets[kept])
        return self._columns(rows, contexts, requests, sources, offsets, tuple(ranges), tuple(dead))

    def _columns(
        self,
        rows: list[tuple[int, int, int, int, int, float]],
        contexts: list[list[int]],
        requests: list[int],
        sources: list[int],
        offsets: list[NDArray[np.int64]],
        ranges: tuple[Range, ...],
        dead: tuple[DeadLetter, ...],
    ) -> EventBatch:
        user, item, category, action, at_ms, label = zip(*rows, strict=True) if rows else ((),) * 6
        actions = np.array(action, np.uint8)
        times = np.array(at_ms, np.int64)
        return EventBatch(
            user=np.array(user, np.uint64),
            item=np.array(item, np.uint64),
            category=np.array(category, np.uint64),
            action=actions,
            at_ms=times,
            label=np.array(label, np.float32),
            weight=self._weights[actions],
            context=np.array(contexts, np.uint64).reshape(len(rows), len(self._settings.context)),
            source=np.array(sources, np.uint16),
            offset=np.concatenate(offsets) if offsets else np.empty(0, np.int64),
            ranges=ranges,
            dead=dead,
            names=self._categories.news(int(times.max())) if rows else {},
            item_names=self._items.news(int(times.max())) if rows else {},
            request=np.array(requests, np.uint64),
        )

    def _read(self, event: Any, timestamp_ms: int) -> tuple[int, int, int, int, int, float]:
        """Checks one event; returns user, item, category, action, time, label."""
        settings = self._settings
        at_ms = parse_time(event.time, settings.time_unit) if event.time is not None else self._no_time(timestamp_ms)
        # A record without a Kafka timestamp (-1) can be compared with nothing.
        if timestamp_ms >= 0 and not -self._age_ms <= at_ms - timestamp_ms <= self._future_ms:
            raise DecodeError(Reason.IMPLAUSIBLE_TIME)
        if not 0 <= at_ms < LATEST_MS:
            raise DecodeError(Reason.IMPLAUSIBLE_TIME)
        value = event.user
        if type(value) is not str and type(value) is not int:
            raise DecodeError(Reason.MISSING_FIELD if value is None else Reason.WRONG_TYPE)
        user = self._users.get(value) or self._new_user(value)
        value = event.item
        if type(value) is not str and type(value) is not int:
            item = self._no_id(value, settings.item, event.user)
        else:
            item = self._public.get(value) or self._new_public(value)
            self._items.met[item] = value
        value = event.category
        if type(value) is not str and type(value) is not int:
            category = self._no_id(value, settings.category, event.user)
        else:
            category = self._public.get(value) or self._new_public(value)
            self._categories.met[category] = value
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
        """An id that is neither text nor integer: allowed only where no field is configured, and of a probe user."""
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

    def _new_user(self, value: str | int) -> int:
        if value == "":
            raise DecodeError(Reason.EMPTY_ID)
        return _remember(self._users, value, user_id(self._salt, value))

    def _new_public(self, value: str | int) -> int:
        if value == "":
            raise DecodeError(Reason.EMPTY_ID)
        return _remember(self._public, value, public_id(value))

    def _request(self, value: Any) -> int:
        """The id of an event's request; they pass by and are not remembered."""
        if value is None or value == "":
            return 0
        if type(value) is not str and type(value) is not int:
            raise DecodeError(Reason.WRONG_TYPE)
        return public_id(value)

    def _context(self, event: Any) -> list[int]:
        found = []
        for name, value in zip(self._settings.context, event.context, strict=True):
            if value is None or value == "":
                found.append(0)
                continue
            if not isinstance(value, str | bool | int | float):
                raise DecodeError(Reason.WRONG_TYPE)
            if isinstance(value, float) and not math.isfinite(value):
                raise DecodeError(Reason.NOT_FINITE)
            key = name, context_text(value)
            found.append(self._contexts.get(key) or _remember(self._contexts, key, context_id(*key)))
        return found
