"""TensorFlow Serving's REST interface: status, metadata and predictions of the model, in its forms and with its codes.

GET  /v1/models/profile[/versions/V|/labels/L][/metadata]
POST /v1/models/profile[/versions/V|/labels/L]:predict    {"instances": [...]} or {"inputs": {...}}

Errors are `{"error": TEXT}`, as clients of TensorFlow Serving read them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Annotated, Any

import msgspec
from google.protobuf import json_format
from msgspec import Meta

from deploy.serving.grpc_api.model_services import signature_map
from deploy.serving.host import Host
from deploy.serving.http_api.endpoints import FAILED, JSON, Endpoint, Request, Response, encode
from deploy.serving.http_api.json_tensors import columns, document_of, rows, signature_of, tensors
from deploy.serving.line import QueueLimits
from deploy.serving.tensor_model import MODEL, ModelChoice, TensorModel
from springtide_client.answers import ModelFailure, ModelMetadata, ModelOutputs, ModelPredictions, ModelStatus
from state.errors import BadRequest, NotOffered, SpringtideError
from state.metrics import WorkerMetrics

CHOICES = ("", "/versions/{version}", "/labels/{label}")
LARGEST = 2**63 - 1
_PLACEHOLDERS: Mapping[str, Mapping[str, Any]] = {"model": {"enum": [MODEL]}, "version": {"pattern": "^[0-9]{1,18}$"}}
_FAILURES: Mapping[int, type] = {**FAILED, 400: ModelFailure, 404: ModelFailure, 503: ModelFailure}
_FAILURES_OF_PREDICT = {**_FAILURES, 413: ModelFailure, 504: ModelFailure}
PREDICT = "Predictions by user id, or from raw inputs, as TensorFlow Serving gives them."
METADATA = "The signatures of the model, as TensorFlow Serving says them."
STATUS = "The versions that can be asked for, as TensorFlow Serving's model status."


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
        """What is offered; what stands behind a colon is looked for first."""
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
