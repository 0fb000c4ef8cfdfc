"""Decodes JSON documents into structs and dataclasses, in any thread.

msgspec analyses a type at its first use. If two threads do that at once, one of them may read an unfinished analysis, and
the process crashes. So the first use happens under a lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar, overload

import msgspec

Document = TypeVar("Document")

analysing = threading.Lock()
"""Held while msgspec analyses a type; see above."""

_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}


def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    known = _decoders.get(kind)
    if known is None:
        with analysing:
            known = _decoders[kind] = msgspec.json.Decoder(kind)
    return known


@overload
def decode(data: bytes | str | memoryview, kind: type[Document]) -> Document: ...
@overload
def decode(data: bytes | str | memoryview, kind: Any) -> Any: ...
def decode(data: bytes | str | memoryview, kind: Any) -> Any:
    """Decodes JSON as a value of `kind`.

    >>> decode(b"[1, 2]", list[int])
    [1, 2]

    Raises:
        msgspec.MsgspecError: It is not JSON, or of another type.
    """
    return _decoder(kind).decode(data)


@overload
def convert(
    values: Any, kind: type[Document], strict: bool = True, dec_hook: Callable[[type, Any], Any] | None = None
) -> Document: ...
@overload
def convert(values: Any, kind: Any, strict: bool = True, dec_hook: Callable[[type, Any], Any] | None = None) -> Any: ...
def convert(values: Any, kind: Any, strict: bool = True, dec_hook: Callable[[type, Any], Any] | None = None) -> Any:
    """Converts JSON values to a value of `kind`; the options are those of `msgspec.convert`.

    Raises:
        msgspec.ValidationError: They are of another type.
    """
    _decoder(kind)
    return msgspec.convert(values, kind, strict=strict, dec_hook=dec_hook)
