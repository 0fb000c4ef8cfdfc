"""TensorFlow Serving's interfaces over REST and gRPC: status, metadata and predictions, with its formats and codes.

Tensors in JSON are by row (`instances`) or by column (`inputs`), with bytes as `{"b64": TEXT}`.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any

import msgspec
import numpy as np
import orjson
from google.protobuf import json_format
from msgspec import Meta

from deploy.serving.answers.tensor_model import MODEL, ModelChoice, Signature, Tensor, TensorModel, Tensors, TensorSpec
from deploy.serving.requests.grpc_server import POOL, Method, Service, message
from deploy.serving.requests.http import FAILED, JSON, Endpoint, Headers, Request, Response, encode
from springtide_client.answers import (
    ModelFailure,
    ModelMetadata,
    ModelOutputs,
    ModelPredictions,
    ModelSpec,
    ModelStatus,
    ModelVersion,
    Status,
)
from state.errors import BadRequest, SpringtideError

FORM = '{"instances": [...]} or {"inputs": {...}}'
_VERSION = re.compile("^[0-9]{1,18}$")
_KINDS = {"f": "iuf", "i": "iu", "b": "b"}
"""NumPy kinds of JSON values that each kind of tensor accepts."""
CHOICES = ("", "/versions/{version}", "/labels/{label}")
_PLACEHOLDERS: Mapping[str, Mapping[str, Any]] = {"model": {"enum": [MODEL]}, "version": {"pattern": _VERSION.pattern}}
_FAILURES: Mapping[int, type] = {**FAILED, 400: ModelFailure, 404: ModelFailure, 503: ModelFailure}
_FAILURES_OF_PREDICT = {**_FAILURES, 413: ModelFailure, 504: ModelFailure}

TensorProto, TensorInfo = message("tensorflow.TensorProto"), message("tensorflow.TensorInfo")
SignatureDef = message("tensorflow.SignatureDef")
METHOD = "tensorflow/serving/predict"
_NUMBER_OF = {name: kind.number for name, kind in POOL.FindEnumTypeByName("tensorflow.DataType").values_by_name.items()}
_NAME_OF = {number: name for name, number in _NUMBER_OF.items()}
_FIELDS = {
    "DT_FLOAT": ("<f4", "float_val"),
    "DT_DOUBLE": ("<f8", "double_val"),
    "DT_INT32": ("<i4", "int_val"),
    "DT_INT64": ("<i8", "int64_val"),
    "DT_BOOL": ("|b1", "bool_val"),
    "DT_UINT32": ("<u4", "uint32_val"),
    "DT_UINT64": ("<u8", "uint64_val"),
    "DT_STRING": ("O", "string_val"),
}
"""NumPy type, and the field with the values that are not in `tensor_content`."""
_TYPES = {dtype: _NUMBER_OF[name] for name, (dtype, _) in _FIELDS.items()}
MOST_VALUES = 1 << 20
PACKAGE = "tensorflow.serving"
SIGNATURE_DEF = "signature_def"
NOT_OFFERED = {
    "PredictionService": {
        "Classify": "use Predict: the signature serving_default answers interests",
        "Regress": "use Predict: the signature serving_default answers engagement",
        "MultiInference": "use Predict",
    },
    "ModelService": {
        "HandleReloadConfigRequest": "new versions are taken up by themselves; `springtide pin` and `springtide label` choose one"
    },
}


class QuestionsByRow(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Questions by row: objects of equal form, or plain values if only one input is required."""

    instances: Annotated[list[Any], Meta(min_length=1)]
    signature_name: str = ""


class QuestionsByColumn(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Questions by column: lists by input, or one list if only one input is required."""

    inputs: Annotated[dict[str, Any] | list[Any], Meta(description="By name, or of the only one.")]
    signature_name: str = ""


def model_endpoints(model: TensorModel) -> list[Endpoint]:
    """Returns the endpoints of the model; paths with a colon are matched first."""

    async def predict(request: Request) -> Response:
        asked: QuestionsByRow | QuestionsByColumn = await request.document()
        answer = await model.predict(chosen(request), asked.signature_name, lambda signature: tensors(asked, signature))
        columns = {name: _listed(values) for name, values in answer.outputs.items()}
        document: dict[str, Any]
        if isinstance(asked, QuestionsByRow):
            document = {"predictions": _by_row(columns)}
        else:
            document = {"outputs": next(iter(columns.values())) if len(columns) == 1 else columns}
        return Response(200, orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY))

    async def metadata(request: Request) -> Response:
        version, signatures = model.signatures(chosen(request))
        shown = json_format.MessageToDict(
            signature_map(signatures), preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        spec = ModelSpec(request.path["model"], "", str(version))
        return Response(200, encode(ModelMetadata(spec, {"signature_def": shown})))

    async def status(request: Request) -> Response:
        versions = model.versions(chosen(request))
        shown = [ModelVersion(str(version.version), "AVAILABLE", Status("OK", "")) for version in versions]
        return Response(200, encode(ModelStatus(shown)))

    async def not_offered(request: Request) -> Response:
        raise BadRequest(f"{request.scope['path'][:200]} is not offered", "use :predict", http_status=501)

    def endpoints(
        name: str, suffix: str, method: str, answer: Any, *, shown: bool = True, **options: Any
    ) -> list[Endpoint]:
        return [
            Endpoint(
                name,
                (),
                f"/v1/models/{{model}}{choice}{suffix}",
                _as_tensorflow_serving(answer, method),
                placeholders=_PLACEHOLDERS,
                shown_methods=(method,) if shown else (),
                **options,
            )
            for choice in CHOICES
        ]

    return [
        *endpoints(
            "predict",
            ":predict",
            "POST",
            predict,
            summary="Predictions by user id, or from raw inputs, as TensorFlow Serving gives them.",
            body=(QuestionsByRow, QuestionsByColumn),
            example=FORM,
            returns=(ModelPredictions, ModelOutputs),
            failures=_FAILURES_OF_PREDICT,
        ),
        *endpoints("classify", ":classify", "POST", not_offered, shown=False),
        *endpoints("regress", ":regress", "POST", not_offered, shown=False),
        *endpoints(
            "metadata",
            "/metadata",
            "GET",
            metadata,
            summary="The signatures of the model, in TensorFlow Serving's format.",
            returns=(ModelMetadata,),
            failures=_FAILURES,
        ),
        *endpoints(
            "model",
            "",
            "GET",
            status,
            summary="The versions that can be asked for, as TensorFlow Serving's model status.",
            returns=(ModelStatus,),
            failures=_FAILURES,
        ),
    ]


def _as_tensorflow_serving(
    answer: Callable[[Request], Awaitable[Response]], method: str
) -> Callable[[Request], Awaitable[Response]]:

    async def wrapped(request: Request) -> Response:
        try:
            if request.scope["method"] != method:
                raise BadRequest(
                    f"Malformed request: {request.scope['method']} {request.scope['path'][:200]}", f"use {method}"
                )
            return await answer(request)
        except SpringtideError as error:
            return Response(error.http_status, encode({"error": str(error)}), [*JSON, *error.http_headers])

    return wrapped


def chosen(request: Request) -> ModelChoice:
    """Returns the model that a path selects; raises BadRequest if the version is no number."""
    path = request.path
    version = path.get("version")
    if version is not None and not _VERSION.fullmatch(version):
        raise BadRequest(
            f"Malformed request: the version {version[:100]!r} is not a number", "use the number of a version"
        )
    return ModelChoice(path["model"], None if version is None else int(version), path.get("label"))


def tensors(asked: QuestionsByRow | QuestionsByColumn, signature: Signature) -> Tensors:
    """Returns the inputs of a request; raises BadRequest, with the position, if they do not match the signature."""
    columns: Any = _by_column(asked.instances, signature) if isinstance(asked, QuestionsByRow) else asked.inputs
    if not isinstance(columns, dict) or _is_bytes(columns):
        columns = {_only(signature, "inputs"): columns}
    for name in columns:
        if name not in signature.inputs:
            raise BadRequest(f"there is no input {str(name)[:100]!r}", f"give {', '.join(signature.inputs)}")
    return {name: _array(name, values, signature.inputs[name]) for name, values in columns.items()}


def _by_column(instances: list[Any], signature: Signature) -> dict[str, list[Any]]:
    """Converts rows to columns; a row may omit optional inputs."""
    if not isinstance(instances[0], dict) or _is_bytes(instances[0]):
        return {_only(signature, "instances"): instances}
    columns: dict[str, list[Any]] = {}
    for index, row in enumerate(instances):
        if not isinstance(row, dict) or _is_bytes(row):
            raise BadRequest(f"instances[{index}] is no object, and the first one is", "send all rows alike")
        for name, value in row.items():
            spec = signature.inputs.get(name)
            if spec is None:
                known = ", ".join(signature.inputs)
                raise BadRequest(f"instances[{index}] has no input {name[:100]!r} to give", f"give {known}")
            if name not in columns:
                default = spec.default.decode() if isinstance(spec.default, bytes) else spec.default
                columns[name] = [default] * len(instances)
            columns[name][index] = value
        for name in signature.required():
            if name not in row:
                raise BadRequest(f"instances[{index}] lacks the input {name!r}", "give it in each row")
    return columns


def _only(signature: Signature, key: str) -> str:
    """Returns the one required input; raises BadRequest if there are more."""
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
        texts = np.empty(len(values), np.object_)
        texts[:] = [_bytes(f"{name}[{index}]", value) for index, value in enumerate(values)]
        return texts
    try:
        array = np.array(values)
    except (ValueError, OverflowError):
        raise BadRequest(f"the input {name!r} has lists of unequal length", "send a full array") from None
    wanted = np.dtype(spec.dtype)
    if array.dtype.kind not in _KINDS[wanted.kind]:
        raise BadRequest(f"the input {name!r} has values that are no {wanted.name}", f"send {wanted.name}")
    if wanted.kind == "i" and array.size and array.dtype.kind == "u":
        raise BadRequest(f"the input {name!r} has values beyond {wanted.name}", f"send {wanted.name}")
    with np.errstate(over="ignore"):
        return array.astype(wanted)


def _bytes(label: str, value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if not (_is_bytes(value) and isinstance(value["b64"], str)):
        raise BadRequest(f'{label} is neither a string nor {{"b64": TEXT}}', "send a string")
    try:
        return base64.b64decode(value["b64"], validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(f"{label} is no base64", "encode the bytes as RFC 4648 says") from None


def _by_row(columns: Mapping[str, list[Any]]) -> list[Any]:
    """Returns one element a row: an object by name, or the value itself if there is only one output."""
    if len(columns) == 1:
        return next(iter(columns.values()))
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _listed(values: Tensor) -> list[Any]:
    if values.dtype != np.object_:
        return list(values)
    if values.ndim == 1:
        return [value.decode() for value in values.tolist()]
    return [[value.decode() for value in row] for row in values.tolist()]


def to_array(name: str, proto: Any) -> Tensor:
    """Converts a `tensorflow.TensorProto`; raises BadRequest if type, shape and values of the input `name` do not
    match.
    """
    kind = _NAME_OF.get(proto.dtype, str(proto.dtype))
    if kind not in _FIELDS:
        raise BadRequest(f"the input {name!r} is of type {kind}", f"send one of {', '.join(_FIELDS)}")
    dtype, field = _FIELDS[kind]
    shape = [dim.size for dim in proto.tensor_shape.dim]
    count = 1
    for size in shape:
        # Clients choose the sizes, so their product must be bounded.
        if size < 0 or count * max(size, 1) > MOST_VALUES or len(shape) > 8:
            raise BadRequest(f"the input {name!r} has the shape {shape[:9]}", "send fewer values")
        count *= size
    if proto.tensor_content and dtype != "O":
        if len(proto.tensor_content) != count * np.dtype(dtype).itemsize:
            raise BadRequest(
                f"tensor_content of the input {name!r} does not have the length of its shape", "correct it"
            )
        return np.frombuffer(proto.tensor_content, dtype).reshape(shape)
    given = getattr(proto, field)
    if not (len(given) == count or 0 < len(given) < count):
        raise BadRequest(f"the input {name!r} has {len(given)} values for the shape {shape}", f"send {count}")
    values = np.empty(count, dtype)
    values[: len(given)] = list(given)
    # As in TensorFlow, the last value repeats for the rest.
    values[len(given) :] = given[-1] if count else 0
    return values.reshape(shape)


def to_proto(values: Tensor) -> Any:
    """Returns the `tensorflow.TensorProto` of a tensor."""
    dtype = "O" if values.dtype == np.object_ else values.dtype.newbyteorder("<").str
    proto = TensorProto(dtype=_TYPES[dtype])
    for size in values.shape:
        proto.tensor_shape.dim.add(size=size)
    if dtype == "O":
        proto.string_val.extend(values.reshape(-1).tolist())
    else:
        proto.tensor_content = np.ascontiguousarray(values, dtype).tobytes()
    return proto


def signature_map(signatures: Mapping[str, Signature]) -> Any:
    """Returns the `tensorflow.serving.SignatureDefMap` of signatures; one row is the default of an input by row."""
    signature_map = message(f"{PACKAGE}.SignatureDefMap")()
    for name, signature in signatures.items():
        definition = SignatureDef(method_name=METHOD)
        for infos, specs in ((definition.inputs, signature.inputs), (definition.outputs, signature.outputs)):
            for tensor, spec in specs.items():
                info = TensorInfo(name=tensor, dtype=_TYPES[spec.dtype])
                for size in spec.shape:
                    info.tensor_shape.dim.add(size=size)
                infos[tensor].CopyFrom(info)
        defaults = {
            tensor: np.array([spec.default], spec.dtype)
            for tensor, spec in signature.inputs.items()
            if spec.default is not None
        }
        for tensor, value in {**defaults, **signature.kept}.items():
            definition.defaults[tensor].CopyFrom(to_proto(value))
        signature_map.signature_def[name].CopyFrom(definition)
    return signature_map


def model_services(model: TensorModel) -> list[Service]:
    """Returns TensorFlow Serving's gRPC services."""

    async def predict(request: Any, _: Headers) -> Any:
        def inputs(_: Signature) -> dict[str, Any]:
            return {name: to_array(name, proto) for name, proto in request.inputs.items()}

        spec = request.model_spec
        answer = await model.predict(choice_of(spec), spec.signature_name, inputs, tuple(request.output_filter))
        response = message(f"{PACKAGE}.PredictResponse")()
        _fill(response.model_spec, answer.version, answer.signature)
        for name, values in answer.outputs.items():
            response.outputs[name].CopyFrom(to_proto(values))
        return response

    async def metadata(request: Any, _: Headers) -> Any:
        wanted = list(request.metadata_field)
        if wanted != [SIGNATURE_DEF]:
            raise BadRequest(f"the metadata fields asked for are {wanted}", f"ask for {SIGNATURE_DEF}")
        version, signatures = model.signatures(choice_of(request.model_spec))
        response = message(f"{PACKAGE}.GetModelMetadataResponse")()
        _fill(response.model_spec, version)
        response.metadata[SIGNATURE_DEF].Pack(signature_map(signatures))
        return response

    async def status(request: Any, _: Headers) -> Any:
        response, available = message(f"{PACKAGE}.GetModelStatusResponse")(), message(f"{PACKAGE}.ModelVersionStatus")
        for version in model.versions(choice_of(request.model_spec)):
            status = response.model_version_status.add(version=version.version, state=available.AVAILABLE)
            status.status.SetInParent()
        return response

    offered = {
        "PredictionService": {"Predict": predict, "GetModelMetadata": metadata},
        "ModelService": {"GetModelStatus": status},
    }
    return [
        Service(
            f"{PACKAGE}.{service}",
            [
                *(Method(name, f"{PACKAGE}.{name}Request", answer) for name, answer in methods.items()),
                *(_refusing(service, name, instead) for name, instead in NOT_OFFERED[service].items()),
            ],
        )
        for service, methods in offered.items()
    ]


def choice_of(spec: Any) -> ModelChoice:
    """Returns the model that a `tensorflow.serving.ModelSpec` selects."""
    version = spec.version.value if spec.HasField("version") else None
    return ModelChoice(spec.name, version, spec.version_label if spec.HasField("version_label") else None)


def _fill(spec: Any, version: int, signature: str = "") -> None:
    spec.name, spec.signature_name = MODEL, signature
    spec.version.value = version


def _refusing(service: str, name: str, instead: str) -> Method:
    """Returns a method that is not offered; its error names the alternative."""

    async def refuse(_: Any, __: Headers) -> Any:
        raise BadRequest(f"{service}.{name} is not offered", instead, http_status=501)

    return Method(name, "", refuse)
