"""TensorFlow Serving's gRPC interface, asked by TensorFlow Serving's own client in a process of its own."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor

from deploy.serving.requests.grpc_server import POOL
from deploy.serving.requests.tensorflow_serving import TensorProto, to_array, to_proto
from state.errors import BadRequest
from state.process.ports import free_port
from tests.deploy.serving.stocked import NOW_MS, Stores, digest_of, manifest, tensors
from tests.deploy.serving.test_rest import answers, until, worker

CLIENT = Path(__file__).with_name("public_client.py")
AVAILABLE = 30
PUBLIC = {
    "tensorflow_serving.apis.model_pb2": ["ModelSpec"],
    "tensorflow_serving.apis.predict_pb2": ["PredictRequest", "PredictResponse"],
    "tensorflow_serving.apis.get_model_metadata_pb2": ["GetModelMetadataRequest", "GetModelMetadataResponse", "SignatureDefMap"],
    "tensorflow_serving.apis.get_model_status_pb2": ["GetModelStatusRequest", "GetModelStatusResponse", "ModelVersionStatus"],
    "tensorflow.core.framework.tensor_pb2": ["TensorProto"],
    "tensorflow.core.framework.tensor_shape_pb2": ["TensorShapeProto"],
    "tensorflow.core.protobuf.meta_graph_pb2": ["TensorInfo", "SignatureDef"],
}  # fmt: skip


def test_tensorflow_servings_client_is_answered(stores: Stores) -> None:
    """By id and raw, by version and label, metadata and status, and each refusal with the code of its kind."""
    port, grpc_port = free_port(), free_port()
    made = tensors(stores.lowered, 2, {"user": ["ann"], "category": ["hats"]}, ["tea", "shoes"])
    stores.rows.apply(manifest(2, digest_of(stores.lowered), parent=1), made, NOW_MS, follow=True)
    with worker(stores, port, 1, grpc_port):
        until(lambda: answers(port, "/readyz"))
        run = subprocess.run(
            [sys.executable, str(CLIENT), str(grpc_port)], capture_output=True, text=True, timeout=400, check=False
        )
        assert run.returncode == 0, run.stderr
        body = {"inputs": {"user_id": ["ann", "nobody"], "item": ["i1", "i1"]}}
        model = f"http://127.0.0.1:{port}/v1/models/profile"
        rest = {
            at: httpx.post(f"{model}{at}:predict", json=body, timeout=60.0).json()["outputs"]
            for at in ("", "/versions/1")
        }
    found = json.loads(run.stdout.splitlines()[-1])
    _same(found["predict"], rest[""], 2)
    _same(found["version"], rest["/versions/1"], 1)
    _same(found["label"], rest["/versions/1"], 1)
    assert list(found["filtered"]["outputs"]) == ["vector"]
    assert found["values"]["outputs"]["at"] == [1500]
    assert found["raw"]["signature"] == "raw"
    inputs, outputs, method = found["signatures"]["raw"]
    assert set(found["raw"]["outputs"]) == set(outputs) and "user_row" in inputs
    assert all(len(values) == 3 for values in found["raw"]["outputs"].values())
    assert method == "tensorflow/serving/predict"
    assert set(found["signatures"]["serving_default"][1]) == set(found["predict"]["outputs"])
    assert found["status"] == [[2, AVAILABLE, 0], [1, AVAILABLE, 0]]
    codes = {name: code for name, (code, _) in found["refused"].items()}
    assert codes == {
        "model": "NOT_FOUND", "version": "NOT_FOUND", "negative": "NOT_FOUND", "label": "NOT_FOUND",
        "signature": "INVALID_ARGUMENT", "type": "INVALID_ARGUMENT", "shape": "INVALID_ARGUMENT",
        "size": "INVALID_ARGUMENT", "missing": "INVALID_ARGUMENT", "field": "INVALID_ARGUMENT",
        "classify": "UNIMPLEMENTED",
    }  # fmt: skip
    known = {"model": "profile", "version": "2, 1", "label": "previous, stable", "classify": "Predict"}
    assert all(words in found["refused"][name][1] for name, words in known.items())


def _same(given: dict[str, Any], rest: dict[str, Any], version: int) -> None:
    """Over gRPC it is what it is over REST; times go on between the two."""
    assert (given["version"], given["signature"]) == (version, "serving_default")
    assert set(given["outputs"]) == set(rest)
    for name in ("interest_labels", "interest_ids", "known"):
        assert given["outputs"][name] == rest[name]
    for name in ("interest_probabilities", "engagement", "vector"):
        np.testing.assert_allclose(given["outputs"][name], rest[name], atol=1e-3)


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
