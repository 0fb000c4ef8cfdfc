"""Answers over gRPC: the server, profiles as over HTTP, and TensorFlow Serving's services."""

from __future__ import annotations

import asyncio
import importlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf.descriptor import Descriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry
from tensorflow_serving.apis.classification_pb2 import ClassificationRequest
from tensorflow_serving.apis.get_model_metadata_pb2 import GetModelMetadataRequest, SignatureDefMap
from tensorflow_serving.apis.get_model_status_pb2 import GetModelStatusRequest
from tensorflow_serving.apis.model_pb2 import ModelSpec
from tensorflow_serving.apis.model_service_pb2_grpc import ModelServiceStub
from tensorflow_serving.apis.predict_pb2 import PredictRequest
from tensorflow_serving.apis.prediction_service_pb2_grpc import PredictionServiceStub

from deploy.serving.answers.queue import QueueLimits
from deploy.serving.requests.grpc_server import POOL, PROTOS, Method, Service, handler_of, message
from deploy.serving.requests.tensorflow_serving import TensorProto, to_array, to_proto
from deploy.serving.requests.worker_metrics import RequestCounts
from state.errors import BadRequest, NotReady
from state.events.identity import public_id
from state.metrics import WorkerMetrics
from state.process.network import free_port
from tests.deploy.serving.stocked import NOW_MS, Stores, digest_of, manifest, tensors
from tests.deploy.serving.test_rest import answers, until, worker

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@contextmanager
def channel_to(port: int) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_health_follows_readiness_and_a_worker_ends_in_order(stores: Stores, workers: int) -> None:
    port, grpc_port = free_port(), free_port()
    with worker(stores, port, workers, grpc_port) as process, channel_to(grpc_port) as channel:
        until(lambda: answers(port, "/readyz"))
        stub = health_pb2_grpc.HealthStub(channel)
        asked = health_pb2.HealthCheckRequest()
        # The worker of this connection may be another one than the first to be ready.
        until(lambda: stub.Check(asked, wait_for_ready=True, timeout=30).status == SERVING)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Check(health_pb2.HealthCheckRequest(service="no.such.Service"), timeout=30)
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
        watched, left = (stub.Watch(asked, timeout=60) for _ in range(2))
        assert next(watched).status == next(left).status == SERVING
        left.cancel()
        process.send_signal(signal.SIGTERM)
        assert [one.status for one in watched] == [NOT_SERVING]
        _, log = process.communicate(timeout=30)
        assert process.returncode == 0, log


def test_a_worker_without_a_version_is_not_serving(stores: Stores) -> None:
    port, grpc_port = free_port(), free_port()
    (stores.settings.serving_dir / "programs").rename(stores.settings.serving_dir / "gone")
    with worker(stores, port, 1, grpc_port), channel_to(grpc_port) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        asked = health_pb2.HealthCheckRequest()
        assert stub.Check(asked, wait_for_ready=True, timeout=60).status == NOT_SERVING
        (stores.settings.serving_dir / "gone").rename(stores.settings.serving_dir / "programs")
        until(lambda: answers(port, "/readyz"))
        assert stub.Check(asked, timeout=30).status == SERVING


def test_a_taken_port_is_one_line_with_its_setting(stores: Stores) -> None:
    port, grpc_port = free_port(), free_port()
    with worker(stores, port, 1, grpc_port):
        until(lambda: answers(port, "/healthz"))
        with worker(stores, free_port(), 1, grpc_port) as second:
            _, log = second.communicate(timeout=60)
    assert second.returncode == 1 and len(log.splitlines()) == 1
    assert f"port {grpc_port}" in log and "serving.grpc_port" in log


def test_reflection_tells_of_every_service_with_its_messages(stores: Stores) -> None:
    port, grpc_port = free_port(), free_port()
    with worker(stores, port, 1, grpc_port), channel_to(grpc_port) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        Asked = reflection_pb2.ServerReflectionRequest

        def ask(request: reflection_pb2.ServerReflectionRequest) -> reflection_pb2.ServerReflectionResponse:
            return next(stub.ServerReflectionInfo(iter([request]), wait_for_ready=True, timeout=60))

        listed = [one.name for one in ask(Asked(list_services="*")).list_services_response.service]
        assert {health.SERVICE_NAME, reflection.SERVICE_NAME} <= set(listed)
        for name in listed:
            files = ask(Asked(file_containing_symbol=name)).file_descriptor_response.file_descriptor_proto
            found = [FileDescriptorProto.FromString(one) for one in files]
            assert any(f"{one.package}.{service.name}" == name for one in found for service in one.service), name


def test_the_descriptors_are_those_of_the_proto_files(tmp_path: Path) -> None:
    made = tmp_path / "descriptors.pb"
    files = sorted(path.name for path in PROTOS.glob("*.proto"))
    # In a process of its own: its protobuf and TensorFlow's do not get on in one.
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"-I{PROTOS}",
        "--include_imports",
        f"--descriptor_set_out={made}",
    ]
    subprocess.run([*command, *files], check=True, timeout=300)
    kept = FileDescriptorSet.FromString((PROTOS / "descriptors.pb").read_bytes())
    assert FileDescriptorSet.FromString(made.read_bytes()) == kept, "make descriptors.pb anew: see messages.py"


REQUEST = "springtide.v1.GetProfileRequest"


def refused(error: Exception, data: bytes = b"") -> tuple[grpc.StatusCode, dict[str, Any]]:
    """Code and trailing metadata of a call whose answer raises the error."""

    async def answer(*_: Any) -> Any:
        raise error

    async def go() -> tuple[grpc.StatusCode, dict[str, Any]]:
        server = grpc.aio.server()
        service = Service("test.Refusals", [Method("Ask", REQUEST, answer)])
        counts = RequestCounts(WorkerMetrics(CollectorRegistry()), lambda: None)
        server.add_generic_rpc_handlers([handler_of(service, counts)])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                with pytest.raises(grpc.aio.AioRpcError) as found:
                    await channel.unary_unary("/test.Refusals/Ask")(data, timeout=30, wait_for_ready=True)
        finally:
            await server.stop(0)
        return found.value.code(), dict(found.value.trailing_metadata())

    return asyncio.run(go())


def test_who_is_refused_for_load_is_told_when_to_come_again() -> None:
    with pytest.raises(Exception, match="more is asked") as overload:
        QueueLimits(expected_s=1.0).admit(2.5)
    assert refused(overload.value) == (grpc.StatusCode.RESOURCE_EXHAUSTED, {"retry-after": "3"})


def test_each_error_has_its_code() -> None:
    assert refused(QueueLimits(waited_s=1.0).too_late())[0] == grpc.StatusCode.DEADLINE_EXCEEDED
    assert refused(NotReady("no version"))[0] == grpc.StatusCode.UNAVAILABLE
    assert refused(KeyError("a defect"))[0] == grpc.StatusCode.INTERNAL
    assert refused(KeyError("never reached"), b"\xff")[0] == grpc.StatusCode.INVALID_ARGUMENT


def of(name: str) -> Any:
    return message(f"springtide.v1.{name}")


def call(
    channel: grpc.Channel, method: str, request: Any, response: str, metadata: Sequence[tuple[str, str]] = ()
) -> Any:
    """One call, as a generated stub makes it."""
    ask = channel.unary_unary(
        f"/springtide.v1.Profiles/{method}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=of(response).FromString,
    )
    return ask(request, timeout=60, wait_for_ready=True, metadata=metadata)


def test_answers_are_those_of_http_and_what_is_wrong_is_an_invalid_argument(stores: Stores) -> None:
    """Profiles alone and together, ranked items, recommendations, reasons; and the errors of each."""
    port, grpc_port = free_port(), free_port()
    with worker(stores, port, 1, grpc_port), channel_to(grpc_port) as channel:
        until(lambda: answers(port, "/readyz"), 120)
        url = f"http://127.0.0.1:{port}"
        # 1. One profile, with all that it can have.
        fields = ["features", "vector", "attributes", "sources"]
        asked = of("GetProfileRequest")(
            question={"user_id": "ann", "item": "i1", "at_ms": 1_800_000_000_000}, fields=fields
        )
        one = call(channel, "GetProfile", asked, "Profile")
        path = f"/v1/profiles/ann?item=i1&at=1800000000000&fields={','.join(fields)}"
        same = httpx.get(url + path, timeout=60, verify=False).json()
        assert (one.user_id, one.known, one.cold_start, one.at, one.clock) == (
            "ann",
            True,
            False,
            same["at"],
            "request",
        )
        assert dict(one.version.sources) == same["version"]["sources"] and one.version.number == 1
        assert [(each.label, each.id) for each in one.interests] == [
            (each["label"], each["id"]) for each in same["interests"]
        ]
        assert one.engagement.probability == pytest.approx(same["engagement"]["probability"], rel=1e-6)
        assert list(one.vector) == pytest.approx(same["vector"], rel=1e-5) and dict(one.features) == same["features"]
        # 2. Lean ones together, in order.
        many = of("BatchGetProfilesRequest")(questions=[{"user_id": name} for name in ("bob", "ann", "nobody")], top=1)
        found = call(channel, "BatchGetProfiles", many, "BatchGetProfilesResponse").profiles
        assert [each.user_id for each in found] == ["bob", "ann", "nobody"] and found[2].cold_start
        assert all(len(each.interests) == 1 and not each.features and not each.vector for each in found)
        # 3. Items.
        ranking = of("RankRequest")(
            user_id="ann", items=[{"item": "i1"}, {"item": "new", "category": "shoes"}, {"item": "x"}]
        )
        ranked = call(channel, "Rank", ranking, "RankResponse").items
        body: dict[str, Any] = {"user_id": "ann", "items": ["i1", {"item": "new", "category": "shoes"}, "x"]}
        wanted = httpx.post(f"{url}/v1/rank", json=body, timeout=60, verify=False).json()["items"]
        assert [each.item for each in ranked] == [each["item"] for each in wanted]
        assert [each.category for each in ranked if each.HasField("category")] == [
            each["category"] for each in wanted if each["category"]
        ]
        ads = [{"item": "i1", "bid": 2.0, "cap": {"count": 1, "within_s": 3600}}, {"item": "x", "bid": 0.5}]
        bidding = call(
            channel, "Rank", of("RankRequest")(user_id="ann", items=ads, at_ms=1_800_000_000_000), "RankResponse"
        )
        body = {"user_id": "ann", "items": ads, "at": 1_800_000_000_000}
        same = httpx.post(f"{url}/v1/rank", json=body, timeout=60, verify=False).json()
        assert [(each.item, each.bid, each.expected_value) for each in bidding.items] == [
            (each["item"], each["bid"], each["expected_value"]) for each in same["items"]
        ]
        assert [(each.item, each.reason, each.seen) for each in bidding.left_out] == [("i1", "cap", 1)]
        assert not any(each.HasField("bid") for each in ranked)
        items = call(channel, "Recommend", of("RecommendRequest")(user_id="ann", n=5), "RecommendResponse").items
        assert {f"{public_id(item):016x}" for item in ("i1", "i2")} <= {each.id for each in items}
        assert {each.reason for each in items} >= {"again"}
        new = of("RecommendRequest")(user_id="ann", exclude=["clicked", "shown"])
        assert "again" not in {each.reason for each in call(channel, "Recommend", new, "RecommendResponse").items}
        # 4. Why.
        question = {"user_id": "ann", "item": "i1", "at_ms": 1_800_000_000_000}
        why = call(channel, "Explain", of("ExplainRequest")(question=question, top=3), "Explanation")
        same = httpx.get(
            f"{url}/v1/profiles/ann/explain?item=i1&at=1800000000000&top=3", timeout=60, verify=False
        ).json()
        assert (why.item, why.HasField("label"), why.probability) == ("i1", False, pytest.approx(same["probability"]))
        assert [(each.kind, each.words) for each in why.reasons] == [
            (each["kind"], each["words"]) for each in same["reasons"]
        ]
        assert [len(each.events) for each in why.reasons] == [len(each["events"]) for each in same["reasons"]]
        # 5. Near.
        near: list[Any] = []

        def found_near() -> bool:
            near.extend(call(channel, "Similar", of("SimilarRequest")(user_id="ann"), "SimilarResponse").items)
            return bool(near)

        until(found_near)
        (nearest,) = httpx.get(f"{url}/v1/similar/ann", timeout=60, verify=False).json()["items"]
        assert (near[0].id, near[0].category) == (nearest["id"], "hats")
        assert near[0].similarity == pytest.approx(nearest["similarity"], rel=1e-5)
        # 6. What is wrong.
        wrong = [
            ("GetProfile", of("GetProfileRequest")(), "user_id"),
            ("GetProfile", of("GetProfileRequest")(question={"user_id": "a"}, fields=["vektor"]), "vektor"),
            ("GetProfile", of("GetProfileRequest")(question={"user_id": "a", "at_ms": -1}), "no time"),
            ("BatchGetProfiles", of("BatchGetProfilesRequest")(), "profiles: expected"),
            ("Rank", of("RankRequest")(user_id="ann"), "items: expected"),
            ("Rank", of("RankRequest")(user_id="ann", items=[{"item": "a", "bid": -1.0}]), "items/0/bid: expected"),
            ("Rank", of("RankRequest")(user_id="ann", items=[{"item": "a", "cap": {"count": 1}}]), "within_s"),
            ("Recommend", of("RecommendRequest")(user_id="ann", n=101), "n: expected"),
            ("Recommend", of("RecommendRequest")(user_id="ann", exclude=["seen"]), "'seen' cannot be excluded"),
            # `exclude_seen` of 0.2.0: ignored, it would mean another list than the one that was asked for.
            ("Recommend", of("RecommendRequest").FromString(b"\n\x03ann\x20\x01"), "no field number 4"),
            ("Explain", of("ExplainRequest")(question={"user_id": "ann"}, label="tractors"), "tractors"),
            ("Similar", of("SimilarRequest")(user_id="ann", n=0), "n: expected"),
        ]
        for method, request, what in wrong:
            with pytest.raises(grpc.RpcError) as refused:
                call(channel, method, request, "Profile")
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT, method
            assert what in refused.value.details(), method


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
