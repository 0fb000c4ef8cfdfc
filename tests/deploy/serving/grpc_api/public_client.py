"""A client of TensorFlow Serving, of public code alone: `python public_client.py PORT`; prints what it was answered as JSON.

TensorFlow makes and reads the tensors, tensorflow-serving-api has messages and
stubs; nothing of ours is imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

WAIT_S = 60


def request(inputs: dict[str, Any], model: str = "profile", signature: str = "", **choice: Any) -> Any:
    made = predict_pb2.PredictRequest()
    made.model_spec.name, made.model_spec.signature_name = model, signature
    if "version" in choice:
        made.model_spec.version.value = choice["version"]
    if "label" in choice:
        made.model_spec.version_label = choice["label"]
    for name, value in inputs.items():
        made.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return made


def shown(answer: Any) -> dict[str, Any]:
    found = {name: tf.make_ndarray(proto) for name, proto in answer.outputs.items()}
    spec = answer.model_spec
    return {
        "version": spec.version.value, "signature": spec.signature_name,
        "outputs": {
            name: [[one.decode() for one in row] for row in values] if values.dtype == object else values.tolist()
            for name, values in found.items()
        },
    }  # fmt: skip


def code(call: Callable[[], Any]) -> list[str]:
    """The code of gRPC and the message that a call is refused with."""
    try:
        call()
    except grpc.RpcError as error:
        return [error.code().name, error.details()]
    return ["OK", ""]


def main(port: str) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        prediction = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        model = model_service_pb2_grpc.ModelServiceStub(channel)

        def predict(asked: Any) -> Any:
            return prediction.Predict(asked, timeout=WAIT_S, wait_for_ready=True)

        asked = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        asked.model_spec.name = "profile"
        metadata = prediction.GetModelMetadata(asked, timeout=WAIT_S, wait_for_ready=True)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        assert metadata.metadata["signature_def"].Unpack(signatures)
        raw = {
            name: np.zeros([3 if dim.size == -1 else dim.size for dim in one.tensor_shape.dim], np.float32)
            for name, one in signatures.signature_def["raw"].inputs.items()
        }
        status = get_model_status_pb2.GetModelStatusRequest()
        status.model_spec.name = "profile"
        filtered = request({"user_id": ["ann"]})
        filtered.output_filter.append("vector")
        ann = {"user_id": ["ann", "nobody"], "item": ["i1", "i1"]}
        broken = request({"user_id": ["ann"]})
        broken.inputs["user_id"].tensor_shape.dim[0].size = 1 << 40
        print(
            json.dumps(
                {
                    "predict": shown(predict(request(ann))),
                    "filtered": shown(predict(filtered)),
                    "version": shown(predict(request(ann, version=1))),
                    "label": shown(predict(request(ann, label="previous"))),
                    "raw": shown(predict(request(raw, signature="raw"))),
                    "values": shown(predict(request({"user_id": ["ann"], "at": np.array([1500], np.int64)}))),
                    "signatures": {
                        name: [sorted(one.inputs), sorted(one.outputs), one.method_name]
                        for name, one in signatures.signature_def.items()
                    },
                    "status": [
                        [one.version, one.state, one.status.error_code]
                        for one in model.GetModelStatus(status, timeout=WAIT_S).model_version_status
                    ],
                    "refused": {
                        "model": code(lambda: predict(request(ann, "other"))),
                        "version": code(lambda: predict(request(ann, version=99))),
                        "negative": code(lambda: predict(request(ann, version=-1))),
                        "label": code(lambda: predict(request(ann, label="other"))),
                        "signature": code(lambda: predict(request(ann, signature="other"))),
                        "type": code(lambda: predict(request({"user_id": [7]}))),
                        "shape": code(lambda: predict(request({"user_id": [["ann"]]}))),
                        "size": code(lambda: predict(broken)),
                        "missing": code(lambda: predict(request({"item": ["i1"]}))),
                        "field": code(
                            lambda: prediction.GetModelMetadata(
                                get_model_metadata_pb2.GetModelMetadataRequest(model_spec=asked.model_spec)
                            )
                        ),
                        "classify": code(lambda: prediction.Classify(classification_pb2.ClassificationRequest())),
                    },
                }
            )
        )


if __name__ == "__main__":
    main(sys.argv[1])
