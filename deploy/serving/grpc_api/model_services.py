"""TensorFlow Serving's services over gRPC: `PredictionService` and `ModelService`, as far as they mean something here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deploy.serving.grpc_api.messages import message
from deploy.serving.grpc_api.services import Method, Service
from deploy.serving.grpc_api.tensor_protos import signature_def, to_array, to_proto
from deploy.serving.host import Host
from deploy.serving.line import QueueLimits
from deploy.serving.signatures import Signature
from deploy.serving.tensor_model import ModelChoice, TensorModel
from state.errors import BadRequest, NotOffered
from state.metrics import WorkerMetrics

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
    """Methods of TensorFlow Serving that say what to use in their place."""

    def saying(name: str, instead: str) -> Callable[[Any], Any]:
        async def refuse(_: Any) -> Any:
            raise NotOffered(f"{service}.{name} is not offered", instead)

        return refuse

    return [Method(name, "", saying(name, instead)) for name, instead in NOT_OFFERED[service].items()]
