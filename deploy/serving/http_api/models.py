"""TensorFlow Serving's REST interface: status, metadata and predictions of the model, with its formats and status codes.

    GET  /v1/models/profile[/versions/V|/labels/L][/metadata]
    POST /v1/models/profile[/versions/V|/labels/L]:predict    {"instances": [...]} or {"inputs": {...}}

Tensors in JSON are as in TensorFlow Serving: by row (`instances`) or by column (`inputs`), with
bytes as `{"b64": TEXT}`. Errors are `{"error": TEXT}`, as clients of TensorFlow Serving read them.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Annotated, Any

import msgspec
import numpy as np
import orjson
from google.protobuf import json_format
from msgspec import Meta

from deploy.serving.grpc_api.model_services import signature_map
from deploy.serving.host import Host
from deploy.serving.http_api.endpoints import FAILED, JSON, Endpoint, Request, Response, encode
from deploy.serving.line import QueueLimits
from deploy.serving.signatures import Signature, Tensor, Tensors, TensorSpec
from deploy.serving.tensor_model import MODEL, ModelChoice, TensorModel
from springtide_client.answers import ModelFailure, ModelMetadata, ModelOutputs, ModelPredictions, ModelStatus
from state.errors import BadRequest, NotOffered, SpringtideError
from state.metrics import WorkerMetrics

FORM = 'send {"instances": [...]} or {"inputs": {...}}'
_KINDS = {"f": "iuf", "i": "iu", "b": "b"}
"""Kind of tensor -> the NumPy kinds of JSON values that it accepts."""
CHOICES = ("", "/versions/{version}", "/labels/{label}")
LARGEST = 2**63 - 1
_PLACEHOLDERS: Mapping[str, Mapping[str, Any]] = {"model": {"enum": [MODEL]}, "version": {"pattern": "^[0-9]{1,18}$"}}
_FAILURES: Mapping[int, type] = {**FAILED, 400: ModelFailure, 404: ModelFailure, 503: ModelFailure}
_FAILURES_OF_PREDICT = {**_FAILURES, 413: ModelFailure, 504: ModelFailure}
PREDICT = "Predictions by user id, or from raw inputs, as TensorFlow Serving gives them."
METADATA = "The signatures of the model, as TensorFlow Serving says them."
STATUS = "The versions that can be asked for, as TensorFlow Serving's model status."


def document_of(body: bytes) -> dict[str, Any]:
    """The content of a request body.

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
        BadRequest: They do not match the signature; the error names the position.
    """
    given = _by_row(document["instances"], signature) if "instances" in document else document["inputs"]
    if not isinstance(given, dict) or _is_bytes(given):
        given = {_only(signature, "inputs"): given}
    for name in given:
        if name not in signature.inputs:
            raise BadRequest(f"there is no input {str(name)[:100]!r}", f"give {', '.join(signature.inputs)}")
    return {name: _array(name, values, signature.inputs[name]) for name, values in given.items()}


def _by_row(instances: Any, signature: Signature) -> dict[str, list[Any]]:
    """Converts rows to columns; a row may omit optional inputs."""
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


class QuestionsByRow(msgspec.Struct, frozen=True):
    """Questions by row: objects of equal form, or plain values where one input must be given."""

    instances: Annotated[list[Any], Meta(min_length=1)]
    signature_name: str = ""


class QuestionsByColumn(msgspec.Struct, frozen=True):
    """Questions by column: lists by input, or one list where one input must be given."""

    inputs: Annotated[dict[str, Any] | list[Any], Meta(description="By name, or of the only one.")]
    signature_name: str = ""


class Models:
    """The endpoints of the model.

    Args:
        host: What answers.
        metrics: Of the worker.
        limits: How long a question may wait.
    """

    def __init__(self, host: Host, metrics: WorkerMetrics, limits: QueueLimits) -> None:
        self._model = TensorModel(host, metrics, limits)

    def endpoints(self) -> list[Endpoint]:
        """The endpoints; paths with a colon are matched first."""
        model = "/v1/models/{model}"
        predict, metadata, status = (
            _told(self._predict, "POST"),
            _told(self._metadata, "GET"),
            _told(self._status, "GET"),
        )
        not_offered = _told(self._not_offered, "POST")
        asked = partial(Endpoint, told_methods=("POST",), placeholders=_PLACEHOLDERS, failures=_FAILURES_OF_PREDICT)
        read = partial(Endpoint, told_methods=("GET",), placeholders=_PLACEHOLDERS, failures=_FAILURES)
        by = (ModelPredictions, ModelOutputs)
        return [
            *(
                asked(
                    "predict",
                    (),
                    f"{model}{one}:predict",
                    predict,
                    PREDICT,
                    body=(QuestionsByRow, QuestionsByColumn),
                    returns=by,
                )
                for one in CHOICES
            ),
            *(
                Endpoint(verb, (), f"{model}{one}:{verb}", not_offered)
                for verb in ("classify", "regress")
                for one in CHOICES
            ),
            *(
                read("metadata", (), f"{model}{one}/metadata", metadata, METADATA, returns=(ModelMetadata,))
                for one in CHOICES
            ),
            *(read("model", (), f"{model}{one}", status, STATUS, returns=(ModelStatus,)) for one in CHOICES),
        ]

    async def _predict(self, request: Request) -> Response:
        document = document_of(await request.body())
        answer = await self._model.predict(
            chosen(request), signature_of(document), lambda signature: tensors(document, signature)
        )
        shown = (
            {"predictions": rows(answer.outputs)} if "instances" in document else {"outputs": columns(answer.outputs)}
        )
        return Response(200, encode(shown))

    async def _metadata(self, request: Request) -> Response:
        version, found = self._model.signatures(chosen(request))
        shown = json_format.MessageToDict(
            signature_map(found), preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        spec = {"name": request.path["model"], "signature_name": "", "version": str(version)}
        return Response(200, encode({"model_spec": spec, "metadata": {"signature_def": shown}}))

    async def _status(self, request: Request) -> Response:
        status = {"error_code": "OK", "error_message": ""}
        shown = [
            {"version": str(one.version), "state": "AVAILABLE", "status": status}
            for one in self._model.versions(chosen(request))
        ]
        return Response(200, encode({"model_version_status": shown}))

    async def _not_offered(self, request: Request) -> Response:
        raise NotOffered(f"{request.scope['path'][:200]} is not offered", "use :predict")


def chosen(request: Request) -> ModelChoice:
    """The choice that a path makes.

    Raises:
        BadRequest: The version is no number.
    """
    path = request.path
    version = path.get("version")
    # Digits of other scripts are numbers too.
    if version is not None and not (
        version.isascii() and version.isdecimal() and len(version) < 20 and int(version) <= LARGEST
    ):
        raise BadRequest(f"Malformed request: the version {version[:100]!r} is no number", "give one of them")
    return ModelChoice(path["model"], None if version is None else int(version), path.get("label"))


def _told(answer: Callable[[Request], Awaitable[Response]], method: str) -> Callable[[Request], Awaitable[Response]]:
    """Answers in TensorFlow Serving's way where it cannot be answered, other methods among that."""

    async def told(request: Request) -> Response:
        try:
            if request.scope["method"] != method:
                raise BadRequest(
                    f"Malformed request: {request.scope['method']} {request.scope['path'][:200]}", f"use {method}"
                )
            return await answer(request)
        except SpringtideError as error:
            return Response(error.http_status, encode({"error": str(error)}), [*JSON, *error.http_headers])

    return told
