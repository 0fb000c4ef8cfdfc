"""TensorFlow Serving's gRPC interface, asked by TensorFlow Serving's own client."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf.descriptor import Descriptor
from tensorflow_serving.apis.classification_pb2 import ClassificationRequest
from tensorflow_serving.apis.get_model_metadata_pb2 import GetModelMetadataRequest, SignatureDefMap
from tensorflow_serving.apis.get_model_status_pb2 import GetModelStatusRequest
from tensorflow_serving.apis.model_pb2 import ModelSpec
from tensorflow_serving.apis.model_service_pb2_grpc import ModelServiceStub
from tensorflow_serving.apis.predict_pb2 import PredictRequest
from tensorflow_serving.apis.prediction_service_pb2_grpc import PredictionServiceStub

from deploy.serving.requests.grpc_server import POOL
from deploy.serving.requests.tensorflow_serving import TensorProto, to_array, to_proto
from state.errors import BadRequest
from state.process.ports import free_port
from tests.deploy.serving.stocked import NOW_MS, Stores, digest_of, manifest, tensors
from tests.deploy.serving.test_rest import answers, until, worker

PUBLIC = {
    "tensorflow_serving.apis.model_pb2": ["ModelSpec"],
    "tensorflow_serving.apis.predict_pb2": ["PredictRequest", "PredictResponse"],
    "tensorflow_serving.apis.get_model_metadata_pb2": ["GetModelMetadataRequest", "GetModelMetadataResponse", "SignatureDefMap"],
    "tensorflow_serving.apis.get_model_status_pb2": ["GetModelStatusRequest", "GetModelStatusResponse", "ModelVersionStatus"],
    "tensorflow.core.framework.tensor_pb2": ["TensorProto"],
    "tensorflow.core.framework.tensor_shape_pb2": ["TensorShapeProto"],
    "tensorflow.core.protobuf.meta_graph_pb2": ["TensorInfo", "SignatureDef"],
}  # fmt: skip


def outputs_of(answer: Any) -> dict[str, Any]:
    """The outputs as REST has them."""
    found = {name: tf.make_ndarray(proto) for name, proto in answer.outputs.items()}
    return {
        name: [[one.decode() for one in row] for row in values] if values.dtype == object else values.tolist()
        for name, values in found.items()
    }


def test_tensorflow_servings_client_is_answered(stores: Stores) -> None:
    """By id and raw, by version and label, metadata and status, and each refusal with the code of its kind."""
    port, grpc_port = free_port(), free_port()
    made = tensors(stores.lowered, 2, {"user": ["ann"], "category": ["hats"]}, ["tea", "shoes"])
    stores.rows.apply(manifest(2, digest_of(stores.lowered), parent=1), made, NOW_MS, follow=True)
    with worker(stores, port, 1, grpc_port), grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        until(lambda: answers(port, "/readyz"))
        prediction, model = PredictionServiceStub(channel), ModelServiceStub(channel)

        def request(inputs: dict[str, Any], model: str = "profile", **spec: Any) -> PredictRequest:
            asked = PredictRequest(inputs={name: tf.make_tensor_proto(value) for name, value in inputs.items()})
            asked.model_spec.CopyFrom(ModelSpec(name=model, **spec))
            return asked

        def predict(asked: PredictRequest) -> Any:
            return prediction.Predict(asked, timeout=60, wait_for_ready=True)

        # 1. By id, as over REST; times go on between the two.
        ann = {"user_id": ["ann", "nobody"], "item": ["i1", "i1"]}
        for choice, at, version in (
            ({}, "", 2),
            ({"version": {"value": 1}}, "/versions/1", 1),
            ({"version_label": "previous"}, "/versions/1", 1),
        ):
            answer = predict(request(ann, **choice))
            assert (answer.model_spec.version.value, answer.model_spec.signature_name) == (version, "serving_default")
            url = f"http://127.0.0.1:{port}/v1/models/profile{at}:predict"
            given, rest = outputs_of(answer), httpx.post(url, json={"inputs": ann}, timeout=60.0).json()["outputs"]
            assert set(given) == set(rest)
            for name in ("interest_labels", "interest_ids", "known"):
                assert given[name] == rest[name]
            for name in ("interest_probabilities", "engagement", "vector"):
                np.testing.assert_allclose(given[name], rest[name], atol=1e-3)
        filtered = request({"user_id": ["ann"]})
        filtered.output_filter.append("vector")
        assert list(outputs_of(predict(filtered))) == ["vector"]
        assert outputs_of(predict(request({"user_id": ["ann"], "at": np.array([1500], np.int64)})))["at"] == [1500]
        # 2. Metadata, and raw inputs of its form.
        asked = GetModelMetadataRequest(model_spec=ModelSpec(name="profile"), metadata_field=["signature_def"])
        signatures = SignatureDefMap()
        assert prediction.GetModelMetadata(asked, timeout=60).metadata["signature_def"].Unpack(signatures)
        by_id, raw = (signatures.signature_def[name] for name in ("serving_default", "raw"))
        assert set(by_id.outputs) == set(given) and raw.method_name == "tensorflow/serving/predict"
        zeros = {
            name: np.zeros([3 if dim.size == -1 else dim.size for dim in one.tensor_shape.dim], np.float32)
            for name, one in raw.inputs.items()
        }
        found = outputs_of(predict(request(zeros, signature_name="raw")))
        assert set(found) == set(raw.outputs) and all(len(values) == 3 for values in found.values())
        status = model.GetModelStatus(GetModelStatusRequest(model_spec=asked.model_spec)).model_version_status
        assert [(one.version, one.state, one.status.error_code) for one in status] == [(2, 30, 0), (1, 30, 0)]
        # 3. Refusals.
        broken = request({"user_id": ["ann"]})
        broken.inputs["user_id"].tensor_shape.dim[0].size = 1 << 40
        asked.ClearField("metadata_field")
        refusals: list[tuple[Callable[[Any], Any], Any, str, str]] = [
            (predict, request(ann, "other"), "NOT_FOUND", "profile"),
            (predict, request(ann, version={"value": 99}), "NOT_FOUND", "2, 1"),
            (predict, request(ann, version={"value": -1}), "NOT_FOUND", "2, 1"),
            (predict, request(ann, version_label="other"), "NOT_FOUND", "previous, stable"),
            (predict, request(ann, signature_name="other"), "INVALID_ARGUMENT", "serving_default"),
            (predict, request({"user_id": [7]}), "INVALID_ARGUMENT", "user_id"),
            (predict, request({"user_id": [["ann"]]}), "INVALID_ARGUMENT", "shape"),
            (predict, broken, "INVALID_ARGUMENT", "shape"),
            (predict, request({"item": ["i1"]}), "INVALID_ARGUMENT", "missing"),
            (prediction.GetModelMetadata, asked, "INVALID_ARGUMENT", "signature_def"),
            (prediction.Classify, ClassificationRequest(), "UNIMPLEMENTED", "Predict"),
        ]
        for call, wrong, code, words in refusals:
            with pytest.raises(grpc.RpcError) as refused:
                call(wrong)
            assert (refused.value.code().name, words in refused.value.details()) == (code, True), refused.value


def _fields(descriptor: Descriptor) -> dict[str, tuple[int, int, bool, str]]:
    """Number, type and label of each field; enums are integers on the wire."""
    integer = 5
    return {
        one.name: (
            one.number,
            integer if one.enum_type is not None else one.type,
            one.is_repeated,
            one.message_type.full_name if one.message_type is not None else "",
        )
        for one in descriptor.fields
    }


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in PUBLIC.items() for name in names])
def test_a_message_is_the_public_one_on_the_wire(module: str, name: str) -> None:
    """Each field that we know has the public number, type and label; both are in one process, each in its own pool."""
    public = getattr(importlib.import_module(module), name).DESCRIPTOR
    ours = POOL.FindMessageTypeByName(public.full_name)
    there = _fields(public)
    assert ours.fields
    assert {one: fields for one, fields in _fields(ours).items() if there.get(one) != fields} == {}


@pytest.mark.parametrize(
    "values",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3), np.array([True, False]), np.array([-5, 1 << 40]), np.zeros((0, 4), np.float64),
        np.array([[b"a\x00", b""], [b"\xff", b"b"]], np.object_), np.array(7, np.int32),
    ],
)  # fmt: skip
def test_a_tensor_comes_back_as_it_was(values: Any) -> None:
    back = to_array("x", TensorProto.FromString(to_proto(values).SerializeToString()))
    assert back.dtype == values.dtype and back.shape == values.shape and back.tolist() == values.tolist()


def test_the_last_value_stands_for_those_that_follow() -> None:
    proto = TensorProto(dtype=1, float_val=[1.0, 2.0])
    proto.tensor_shape.dim.add(size=4)
    assert to_array("x", proto).tolist() == [1.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("sizes", [[3], [1 << 40], [-1], [1 << 20, 1 << 20], [1] * 9, [0, 1 << 62, 1 << 62]])
def test_a_shape_that_its_values_do_not_fill_is_refused(sizes: list[int]) -> None:
    proto = TensorProto(dtype=1, tensor_content=b"\0" * 8)
    for size in sizes:
        proto.tensor_shape.dim.add(size=size)
    with pytest.raises(BadRequest):
        to_array("x", proto)
