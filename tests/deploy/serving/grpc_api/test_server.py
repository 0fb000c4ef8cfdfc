"""The gRPC server: health, reflection, ends, and the codes of errors."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry

from deploy.serving.answers.queue import QueueLimits
from deploy.serving.requests.grpc_server import PROTOS, Method, Service, handler_of
from deploy.serving.requests.worker_metrics import RequestCounts
from state.errors import NotReady
from state.metrics import WorkerMetrics
from state.process.ports import free_port
from tests.deploy.serving.stocked import Stores
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
        assert stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=30).status == SERVING
        with pytest.raises(grpc.RpcError) as refused:
            stub.Check(health_pb2.HealthCheckRequest(service="no.such.Service"), timeout=30)
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
        watched, left = (stub.Watch(health_pb2.HealthCheckRequest(), timeout=60) for _ in range(2))
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
