"""JSON documents with a digest of their own, as manifests, control and all small files beside them are written. Pure."""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar

import msgspec

Document = TypeVar("Document")


class _Envelope(msgspec.Struct):
    """A document with the digest of its exact bytes."""

    sha256: str
    body: msgspec.Raw


def seal(body: bytes) -> bytes:
    """A JSON document with its own digest, so that a flipped bit in it is seen."""
    digest = hashlib.sha256(body).hexdigest()
    return b'{"sha256":"' + digest.encode() + b'","body":' + body + b"}"


def unseal(data: bytes) -> bytes:
    """The document that `seal` wrapped.

    >>> unseal(seal(b"[1]"))
    b'[1]'

    Raises:
        ValueError: It is no such document, or its digest differs.
    """
    envelope = _as_kind(data, _Envelope)
    body = bytes(envelope.body)
    if hashlib.sha256(body).hexdigest() != envelope.sha256:
        raise ValueError("its digest does not match its content")
    return body


def _as_kind(data: bytes, kind: type[Document]) -> Document:
    """JSON as what a type says.

    Raises:
        ValueError: It is no JSON, or of another shape.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error


def encode(document: Any) -> bytes:
    """A dataclass as JSON with its digest, the same bytes for equal ones."""
    return seal(msgspec.json.encode(document, order="deterministic"))


def decode(data: bytes, kind: type[Document]) -> Document:
    """What `encode` wrote; fields of later releases are left out.

    >>> from dataclasses import make_dataclass
    >>> Place = make_dataclass("Place", [("row", int)])
    >>> decode(encode(Place(7)), Place).row
    7

    Raises:
        ValueError: It is damaged, or a document of another kind.
    """
    return _as_kind(unseal(data), kind)


def as_values(document: Any) -> dict[str, Any]:
    """A dataclass as JSON values, for whoever prints it."""
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(document))
    return found
