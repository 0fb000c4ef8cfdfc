"""TensorFlow Serving's gRPC services `PredictionService` and `ModelService`, as far as they apply to this model.

It converts tensors from and to TensorFlow's messages. Strings are bytes in arrays of objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from deploy.serving.grpc_api.messages import POOL, message
from deploy.serving.grpc_api.services import Method, Service
from deploy.serving.host import Host
from deploy.serving.line import QueueLimits
from deploy.serving.signatures import Signature, Tensor, TensorSpec
from deploy.serving.tensor_model import ModelChoice, TensorModel
from state.errors import BadRequest, NotOffered
from state.metrics import WorkerMetrics

TensorProto, TensorInfo = message("tensorflow.TensorProto"), message("tensorflow.TensorInfo")
SignatureDef = message("tensorflow.SignatureDef")
METHOD = "tensorflow/serving/predict"
NUMBER_OF = {name: one.number for name, one in POOL.FindEnumTypeByName("tensorflow.DataType").values_by_name.items()}
NAME_OF = {number: name for name, number in NUMBER_OF.items()}

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
_TYPES = {dtype: NUMBER_OF[name] for name, (dtype, _) in _FIELDS.items()}
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
PredictResponse = message(f"{PACKAGE}.PredictResponse")
MetadataResponse = message(f"{PACKAGE}.GetModelMetadataResponse")
StatusResponse = message(f"{PACKAGE}.GetModelStatusResponse")
VersionStatus = message(f"{PACKAGE}.ModelVersionStatus")
SignatureDefMap = message(f"{PACKAGE}.SignatureDefMap")


def to_array(name: str, proto: Any) -> Tensor:
    """The tensor of a message.

    Args:
        name: For errors.
        proto: A `tensorflow.TensorProto`.

    Raises:
        BadRequest: Type, shape and values do not belong together.
    """
    kind = NAME_OF.get(proto.dtype, str(proto.dtype))
    if kind not in _FIELDS:
        raise BadRequest(f"the input {name!r} is of type {kind}", f"send one of {', '.join(_FIELDS)}")
    dtype, field = _FIELDS[kind]
    shape = [dim.size for dim in proto.tensor_shape.dim]
    count = 1
    for size in shape:
        # Sizes come from outside: a product of them must not grow without bound.
        if size < 0 or count * max(size, 1) > MOST_VALUES or len(shape) > 8:
            raise BadRequest(f"the input {name!r} has the shape {shape[:9]}", "send fewer values")
        count *= size
    if proto.tensor_content and dtype != "O":
        if len(proto.tensor_content) != count * np.dtype(dtype).itemsize:
            raise BadRequest(
                f"tensor_content of the input {name!r} has another length than its shape says", "correct it"
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
    """The `tensorflow.TensorProto` of a tensor."""
    dtype = "O" if values.dtype == np.object_ else values.dtype.newbyteorder("<").str
    made = TensorProto(dtype=_TYPES[dtype])
    for size in values.shape:
        made.tensor_shape.dim.add(size=size)
    if dtype == "O":
        made.string_val.extend(values.reshape(-1).tolist())
    else:
        made.tensor_content = np.ascontiguousarray(values, dtype).tobytes()
    return made


def signature_def(signature: Signature) -> Any:
    """The `tensorflow.SignatureDef` of a signature."""
    made = SignatureDef(method_name=METHOD)
    for of, specs in ((made.inputs, signature.inputs), (made.outputs, signature.outputs)):
        for name, spec in specs.items():
            of[name].CopyFrom(_info(name, spec))
    for name, value in _defaults(signature).items():
        made.defaults[name].CopyFrom(to_proto(value))
    return made


def _info(name: str, spec: TensorSpec) -> Any:
    made = TensorInfo(name=name, dtype=_TYPES[spec.dtype])
    for size in spec.shape:
        made.tensor_shape.dim.add(size=size)
    return made


def _defaults(signature: Signature) -> Mapping[str, Tensor]:
    """The default of each input that is left out; for inputs with one row per request row, one row."""
    own = {
        name: np.array([one.default], one.dtype) for name, one in signature.inputs.items() if one.default is not None
    }
    return own | dict(signature.kept)


def model_services(host: Host, metrics: WorkerMetrics, limits: QueueLimits) -> list[Service]:
    """Both services."""
    one = ModelServices(TensorModel(host, metrics, limits))
    return [
        Service(
            f"{PACKAGE}.PredictionService",
            [
                Method("Predict", f"{PACKAGE}.PredictRequest", one.predict),
                Method("GetModelMetadata", f"{PACKAGE}.GetModelMetadataRequest", one.metadata),
                *_not_offered("PredictionService"),
            ],
        ),
        Service(
            f"{PACKAGE}.ModelService",
            [
                Method("GetModelStatus", f"{PACKAGE}.GetModelStatusRequest", one.status),
                *_not_offered("ModelService"),
            ],
        ),
    ]


class ModelServices:
    """What the methods answer.

    Args:
        model: What is asked.
    """

    def __init__(self, model: TensorModel) -> None:
        self._model = model

    async def predict(self, request: Any) -> Any:
        """`Predict`."""
        choice = chosen(request.model_spec)

        def inputs(_: Signature) -> dict[str, Any]:
            return {name: to_array(name, proto) for name, proto in request.inputs.items()}

        answer = await self._model.predict(
            choice, request.model_spec.signature_name, inputs, tuple(request.output_filter)
        )
        made = PredictResponse()
        _fill(made.model_spec, answer.version, answer.signature)
        for name, values in answer.outputs.items():
            made.outputs[name].CopyFrom(to_proto(values))
        return made

    async def metadata(self, request: Any) -> Any:
        """`GetModelMetadata`."""
        wanted = list(request.metadata_field)
        if wanted != [SIGNATURE_DEF]:
            raise BadRequest(f"the metadata fields asked for are {wanted}", f"ask for {SIGNATURE_DEF}")
        version, found = self._model.signatures(chosen(request.model_spec))
        made = MetadataResponse()
        _fill(made.model_spec, version)
        made.metadata[SIGNATURE_DEF].Pack(signature_map(found))
        return made

    async def status(self, request: Any) -> Any:
        """`GetModelStatus`."""
        made = StatusResponse()
        for one in self._model.versions(chosen(request.model_spec)):
            status = made.model_version_status.add(version=one.version, state=VersionStatus.AVAILABLE)
            status.status.SetInParent()
        return made


def chosen(spec: Any) -> ModelChoice:
    """The choice that a `tensorflow.serving.ModelSpec` makes."""
    version = spec.version.value if spec.HasField("version") else None
    return ModelChoice(spec.name, version, spec.version_label if spec.HasField("version_label") else None)


def signature_map(signatures: dict[str, Signature]) -> Any:
    """The `tensorflow.serving.SignatureDefMap` of signatures."""
    made = SignatureDefMap()
    for name, one in signatures.items():
        made.signature_def[name].CopyFrom(signature_def(one))
    return made


def _fill(spec: Any, version: int, signature: str = "") -> None:
    spec.name, spec.signature_name = "profile", signature
    spec.version.value = version


def _not_offered(service: str) -> list[Method]:
    """The methods of TensorFlow Serving that are not offered; they answer what to use instead."""

    def saying(name: str, instead: str) -> Callable[[Any], Any]:
        async def refuse(_: Any) -> Any:
            raise NotOffered(f"{service}.{name} is not offered", instead)

        return refuse

    return [Method(name, "", saying(name, instead)) for name, instead in NOT_OFFERED[service].items()]
