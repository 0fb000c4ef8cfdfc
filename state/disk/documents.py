"""JSON documents: decodes them into structs and dataclasses in any thread, and seals them with their own digest.

msgspec analyses a type at its first use. If two threads do that at once, one of them may read an unfinished analysis, and
the process crashes. So the first use happens under a lock.

Manifests, control and small files are sealed.
"""

from __future__ import annotations

import hashlib
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


class _Envelope(msgspec.Struct):
    """A document with the digest of its exact bytes."""

    sha256: str
    body: msgspec.Raw


def seal(body: bytes) -> bytes:
    """Wraps a JSON document with its digest, so that a flipped bit is detected."""
    digest = hashlib.sha256(body).hexdigest()
    return b'{"sha256":"' + digest.encode() + b'","body":' + body + b"}"


def unseal(data: bytes) -> bytes:
    """Returns the document that `seal` wrapped.

    >>> unseal(seal(b"[1]"))
    b'[1]'

    Raises:
        ValueError: It is not such a document, or its digest differs.
    """
    envelope = _as_kind(data, _Envelope)
    body = bytes(envelope.body)
    if hashlib.sha256(body).hexdigest() != envelope.sha256:
        raise ValueError("its digest does not match its content")
    return body


def _as_kind(data: bytes, kind: type[Document]) -> Document:
    try:
        return decode(data, kind)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error


def encode_sealed(document: Any) -> bytes:
    """Encodes a struct, a dataclass or JSON values with their digest; equal documents give equal bytes."""
    return seal(msgspec.json.encode(document, order="deterministic"))


def decode_sealed(data: bytes, kind: type[Document]) -> Document:
    """Decodes what `encode_sealed` wrote; fields of later releases are ignored.

    >>> from dataclasses import make_dataclass
    >>> Place = make_dataclass("Place", [("row", int)])
    >>> decode_sealed(encode_sealed(Place(7)), Place).row
    7

    Raises:
        ValueError: It is damaged, or a document of another kind.
    """
    return _as_kind(unseal(data), kind)
