"""JSON documents that contain their own digest: the format of manifests, control and small files. Pure."""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar

import msgspec

from state.disk import documents

Document = TypeVar("Document")


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
        return documents.decode(data, kind)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error


def encode(document: Any) -> bytes:
    """Encodes a struct, a dataclass or JSON values with their digest; equal documents give equal bytes."""
    return seal(msgspec.json.encode(document, order="deterministic"))


def decode(data: bytes, kind: type[Document]) -> Document:
    """Decodes what `encode` wrote; fields of later releases are ignored.

    >>> from dataclasses import make_dataclass
    >>> Place = make_dataclass("Place", [("row", int)])
    >>> decode(encode(Place(7)), Place).row
    7

    Raises:
        ValueError: It is damaged, or a document of another kind.
    """
    return _as_kind(unseal(data), kind)
