"""Decodes a record's bytes to the fields of a click: the JSON decoder, the interface of user decoders, and times.

A record that cannot become an event is a dead letter, with a reason code.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from operator import attrgetter
from typing import Any, NamedTuple, cast

import msgspec

from state.config.sections import Events as EventSettings
from state.errors import DecodeError
from state.positions import Source
from state.process.user_code import load_named

MOST_EVENT_BYTES = 1_000_000
"""Maximum size of a record of clicks or attributes; a larger one is a dead letter."""


class Reason(enum.StrEnum):
    """Why a record is a dead letter."""

    UNDECODABLE = "undecodable"
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"
    EMPTY_ID = "empty_id"
    NOT_FINITE = "not_finite"
    IMPLAUSIBLE_TIME = "implausible_time"
    TOO_LARGE = "too_large"
    UNKNOWN_ACTION = "unknown_action"
    CORRUPT_RECORD = "corrupt_record"


def reason_of(error: Exception) -> Reason:
    """The reason code of an error raised by a decoder or the parser; an unknown code counts as undecodable."""
    code = getattr(error, "reason", Reason.UNDECODABLE)
    return Reason(code) if code in set(Reason) else Reason.UNDECODABLE


class DeadLetter(NamedTuple):
    """A record that cannot become an event: its position and the reason, without its key and value."""

    source: Source
    offset: int
    reason: Reason


MILLISECONDS_FROM = 1e11  # numbers from this on are milliseconds: as seconds this is the year 5138
LATEST_MS = 1 << 52  # below it the integers of the kernel and of JSON are exact


Decoder = Callable[[bytes], Any]

_IDS = str | int | None
_ANY = str | bool | int | float | None
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("user", "item", "category", "action", "request"), _IDS),
    "time": int | float | str | None,
    "label": bool | int | float | None,
}


def decode_json(settings: EventSettings) -> Decoder:
    """Creates the decoder of JSON objects; also the example for a custom decoder.

    `events.decoder` names a function like this one as `module:name`. The function gets the section `[events]` and
    returns a function that maps a record's value to any object with the attributes

        user, item, category, action: str | int | None
        time:    int | float | str | None
        label:   bool | int | float | None
        context: a sequence of str | int | float | bool | None, one for each of
                 `events.context`; may be missing if none are configured
        request: str | int | None; may be missing if `events.request` is empty

    None means that the field is missing; the parser checks everything else. For a value that cannot be decoded, the
    function raises ValueError, or DecodeError with one of `state.events.decoding.Reason`.

    >>> decode_json(EventSettings(user="who"))(b'{"who": 7, "item": "a", "more": []}').user
    7
    """
    names = {
        "user": settings.user,
        "item": settings.item,
        "category": settings.category,
        "action": settings.action,
        "time": settings.time,
        "label": settings.label,
        "request": settings.request,
        **{f"context_{index}": name for index, name in enumerate(settings.context)},
    }
    # One field of the record may map to several attributes, such as the category and a context.
    owners: dict[str, list[str]] = {}
    for attribute, name in names.items():
        owners.setdefault(name, []).append(attribute)
    context = [f"context_{index}" for index in range(len(settings.context))]
    namespace: dict[str, Any] = {"context": property(lambda event: [getattr(event, name) for name in context])}
    namespace |= dict.fromkeys(owners.pop("", []))
    for first, *others in owners.values():
        namespace |= {other: property(attrgetter(first)) for other in others}
    fields: list[Any] = [
        (attributes[0], _KINDS.get(attributes[0], _ANY) if len(attributes) == 1 else _ANY, None)
        for attributes in owners.values()
    ]
    rename = {attributes[0]: name for name, attributes in owners.items()}
    struct = msgspec.defstruct("Click", fields, namespace=namespace, rename=rename, gc=False)
    decode = msgspec.json.Decoder(struct).decode

    def read(value: bytes) -> Any:
        try:
            return decode(value)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise DecodeError(why(value, error)) from None

    return read


def why(value: bytes, error: Exception) -> Reason:
    """The reason code for a value that the strict JSON decoder refused."""
    if isinstance(error, msgspec.ValidationError) and "out of range" not in str(error):
        return Reason.WRONG_TYPE
    infinite: list[str] = []
    try:
        # Python's reader accepts NaN and Infinity, which are not valid JSON.
        json.loads(value, parse_constant=infinite.append)
    except (ValueError, RecursionError):
        return Reason.UNDECODABLE
    return Reason.NOT_FINITE if infinite or "out of range" in str(error) else Reason.UNDECODABLE


def load_decoder(settings: EventSettings) -> Decoder:
    """Loads the decoder that `events.decoder` names."""
    return cast(Decoder, load_named(settings.decoder, "events.decoder")(settings))


def parse_time(value: Any, unit: str) -> int:
    """Parses an event's time to milliseconds since 1970, UTC.

    `value` is a number, or text with a number or an ISO 8601 time, without a zone in UTC; `unit` is auto, ms, s or iso.

    >>> [parse_time(value, "auto") for value in (1_700_000_000, 1.7e12, "1700000000.5", "2023-11-14T22:13:20Z")]
    [1700000000000, 1700000000000, 1700000000500, 1700000000000]
    """
    kind = type(value)
    if kind is str:
        value, text = None, value
        if unit != "iso":
            try:
                value = int(text) if text.isascii() and text.isdigit() else float(text)
            except ValueError:
                value = None
        if value is None:
            if unit in ("ms", "s"):
                raise DecodeError(Reason.WRONG_TYPE)
            try:
                moment = datetime.fromisoformat(text)
                return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
            except (ValueError, OverflowError):
                raise DecodeError(Reason.WRONG_TYPE) from None
    elif (kind is not int and kind is not float) or unit == "iso":
        raise DecodeError(Reason.WRONG_TYPE)
    if not -LATEST_MS < value < LATEST_MS:
        raise DecodeError(Reason.IMPLAUSIBLE_TIME if math.isfinite(value) else Reason.NOT_FINITE)
    if unit == "s" or (unit == "auto" and value < MILLISECONDS_FROM):
        value = value * 1000
    return value if type(value) is int else round(value)
