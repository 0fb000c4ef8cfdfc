"""Clicks as MessagePack maps: `[events] decoder = "deploy.examples.own_decoder.messagepack:decode_messagepack"`.

A decoder only splits a record's bytes into fields. With every decoder, the parser checks types, ids, times and labels.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec

from state.config.sections import Events
from state.errors import DecodeError
from state.events.decoding import Decoder, Reason

FIELDS = ("user", "item", "category", "action", "time", "label", "request")


def decode_messagepack(settings: Events) -> Decoder:
    """Creates the decoder; fields have the names that `[events]` gives them.

    >>> read = decode_messagepack(Events(user="who"))
    >>> read(msgspec.msgpack.encode({"who": 7, "more": []})).user
    7
    """
    names = {field: getattr(settings, field) for field in FIELDS}
    decode = msgspec.msgpack.Decoder().decode

    def read(value: bytes) -> Any:
        try:
            record = decode(value)
        except (msgspec.DecodeError, ValueError, TypeError, RecursionError):
            raise DecodeError(Reason.UNDECODABLE) from None
        if not isinstance(record, dict):
            raise DecodeError(Reason.WRONG_TYPE)
        values = {field: record.get(name) if name else None for field, name in names.items()}
        return SimpleNamespace(**values, context=[record.get(name) for name in settings.context])

    return read
