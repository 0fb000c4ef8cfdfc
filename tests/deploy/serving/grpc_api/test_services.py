"""What a method of gRPC answers where it cannot: a code, and for load when to come again."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

from deploy.serving.answers.queue import QueueLimits
from deploy.serving.requests.grpc_server import Method, Service, handler_of
from deploy.serving.requests.worker_metrics import RequestCounts
from state.errors import NotReady
from state.metrics import WorkerMetrics

REQUEST = "springtide.v1.GetProfileRequest"


def refused(error: Exception, data: bytes = b"") -> tuple[grpc.StatusCode, dict[str, Any]]:
    """Code and trailing metadata of a call whose answer raises the error."""

    async def answer(_: Any) -> Any:
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
    """A failure of ours is one, and a message that is none is the client's."""
    assert refused(QueueLimits(waited_s=1.0).too_late())[0] == grpc.StatusCode.DEADLINE_EXCEEDED
    assert refused(NotReady("no version"))[0] == grpc.StatusCode.UNAVAILABLE
    assert refused(KeyError("a defect"))[0] == grpc.StatusCode.INTERNAL
    assert refused(KeyError("never reached"), b"\xff")[0] == grpc.StatusCode.INVALID_ARGUMENT
