"""Tensors in JSON as TensorFlow Serving has them: by row (`instances`) or by column (`inputs`), bytes as `{"b64": TEXT}`."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson

from deploy.serving.signatures import Signature, Tensor, Tensors, TensorSpec
from state.errors import BadRequest

FORM = 'send {"instances": [...]} or {"inputs": {...}}'
_KINDS = {"f": "iuf", "i": "iu", "b": "b"}
"""NumPy's kinds of JSON numbers that each kind of tensor takes."""


def document_of(body: bytes) -> dict[str, Any]:
    """What a body says.

    Raises:
        BadRequest: It is no JSON object, or has not one of `instances` and `inputs`.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"JSON Parse error: {error}", FORM) from None
    if not isinstance(document, dict):
        raise BadRequest("the body is no JSON object", FORM)
    if ("instances" in document) == ("inputs" in document):
        raise BadRequest("the body has not exactly one of 'instances' and 'inputs'", FORM)
    return document


def signature_of(document: Mapping[str, Any]) -> str:
    """The name of the signature that is asked; empty for the default.

    Raises:
        BadRequest: It is no string.
    """
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise BadRequest("'signature_name' is no string", "give a signature's name")
    return name


def tensors(document: Mapping[str, Any], signature: Signature) -> Tensors:
    """The inputs of a document.

    Raises:
        BadRequest: They are not of the signature's form; the error says where.
    """
    given = _by_row(document["instances"], signature) if "instances" in document else document["inputs"]
    if not isinstance(given, dict) or _is_bytes(given):
        given = {_only(signature, "inputs"): given}
    for name in given:
        if name not in signature.inputs:
            raise BadRequest(f"there is no input {str(name)[:100]!r}", f"give {', '.join(signature.inputs)}")
    return {name: _array(name, values, signature.inputs[name]) for name, values in given.items()}


def _by_row(instances: Any, signature: Signature) -> dict[str, list[Any]]:
    """Rows turned into columns; a row may leave out what may be left out."""
    if not isinstance(instances, list) or not instances:
        raise BadRequest("'instances' is no list with at least one element", FORM)
    first_is_object = isinstance(instances[0], dict) and not _is_bytes(instances[0])
    if not first_is_object:
        return {_only(signature, "instances"): instances}
    found: dict[str, list[Any]] = {}
    for place, one in enumerate(instances):
        if not isinstance(one, dict) or _is_bytes(one):
            raise BadRequest(f"instances[{place}] is no object, and the first one is", "send all rows alike")
        for name, value in one.items():
            spec = signature.inputs.get(name)
            if spec is None:
                known = ", ".join(signature.inputs)
                raise BadRequest(f"instances[{place}] has no input {name[:100]!r} to give", f"give {known}")
            if name not in found:
                found[name] = [_default(spec)] * len(instances)
            found[name][place] = value
        for name in signature.required():
            if name not in one:
                raise BadRequest(f"instances[{place}] lacks the input {name!r}", "give it in each row")
    return found


def _default(spec: TensorSpec) -> Any:
    return spec.default.decode() if isinstance(spec.default, bytes) else spec.default


def _only(signature: Signature, key: str) -> str:
    """The one input that must be given.

    Raises:
        BadRequest: There are more of them.
    """
    needed = signature.required()
    if len(needed) != 1:
        raise BadRequest(f"'{key}' has values without names", f"name them: {', '.join(needed)}")
    return needed[0]


def _is_bytes(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"b64"}


def _array(name: str, values: Any, spec: TensorSpec) -> Tensor:
    if spec.dtype == "O":
        if not isinstance(values, list):
            raise BadRequest(f"the input {name!r} is no list of strings", "give one string for each row")
        made = np.empty(len(values), np.object_)
        made[:] = [_bytes(f"{name}[{place}]", value) for place, value in enumerate(values)]
        return made
    try:
        found = np.array(values)
    except (ValueError, OverflowError):
        raise BadRequest(f"the input {name!r} has lists of unequal length", "send a full array") from None
    wanted = np.dtype(spec.dtype)
    if found.dtype.kind not in _KINDS[wanted.kind]:
        raise BadRequest(f"the input {name!r} has values that are no {wanted.name}", f"send {wanted.name}")
    if wanted.kind == "i" and found.size and found.dtype.kind == "u":
        raise BadRequest(f"the input {name!r} has values beyond {wanted.name}", f"send {wanted.name}")
    with np.errstate(over="ignore"):
        return found.astype(wanted)


def _bytes(place: str, value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if not (_is_bytes(value) and isinstance(value["b64"], str)):
        raise BadRequest(f'{place} is neither a string nor {{"b64": TEXT}}', "send a string")
    try:
        return base64.b64decode(value["b64"], validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(f"{place} is no base64", "encode the bytes as RFC 4648 says") from None


def rows(outputs: Tensors) -> list[Any]:
    """One element a row: an object by name, or the value itself where there is one output."""
    listed = {name: _listed(values) for name, values in outputs.items()}
    if len(listed) == 1:
        (only,) = listed.values()
        return only
    return [dict(zip(listed, row, strict=True)) for row in zip(*listed.values(), strict=True)]


def columns(outputs: Tensors) -> Any:
    """Lists by name, or one list where there is one output."""
    listed = {name: _listed(values) for name, values in outputs.items()}
    return next(iter(listed.values())) if len(listed) == 1 else listed


def _listed(values: Tensor) -> list[Any]:
    if values.dtype != np.object_:
        return list(values)
    if values.ndim == 1:
        return [one.decode() for one in values.tolist()]
    return [[one.decode() for one in row] for row in values.tolist()]
