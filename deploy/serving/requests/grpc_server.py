"""A worker's gRPC server on its own event loop: messages, services and their errors, health and reflection.

The messages have a descriptor pool of their own, because TensorFlow's have the same names in protobuf's default
pool. These commands build `protos/descriptors.pb`:

    cd deploy/serving/requests/protos
    python -m grpc_tools.protoc -I. --include_imports --descriptor_set_out=descriptors.pb *.proto
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf import message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_reflection.v1alpha import reflection, reflection_pb2

from deploy.serving.requests.access import READ, Access, Tokens
from deploy.serving.requests.http import Headers
from deploy.serving.requests.worker_metrics import RequestCounts
from state.errors import BadRequest, SpringtideError

PROTOS = Path(__file__).with_name("protos")
CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    405: grpc.StatusCode.UNIMPLEMENTED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
MOST_MESSAGE_BYTES = 4 << 20
POLL_S = 0.2
"""Interval of polls for the server's end, which while a call is open only a poll notices."""
AGAIN_S = 0.05
"""Wait before the next attempt to bind the port of a server that ended."""
HEALTH_S = 1.0
_log = logging.getLogger(__name__)


def _pool() -> DescriptorPool:
    """Returns the pool of all messages and services, which reflection lists."""
    pool = DescriptorPool()
    for file in FileDescriptorSet.FromString((PROTOS / "descriptors.pb").read_bytes()).file:
        pool.AddSerializedFile(file.SerializeToString())
    for descriptor in (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
        pool.AddSerializedFile(descriptor.serialized_pb)
    return pool


POOL = _pool()


def message(name: str) -> Any:
    """Returns the class of a message in this module's pool.

    >>> message("tensorflow.serving.ModelSpec")(name="profile").name
    'profile'
    """
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))


@dataclass(frozen=True)
class Method:
    """A method of a service.

    Attributes:
        name: The name in the `.proto` file.
        request: The full name of the request's message; empty if `answer` takes the raw bytes.
        answer: Answers a request, given its message and the HTTP headers of the same meaning; raises an error otherwise.
    """

    name: str
    request: str
    answer: Callable[[Any, Headers], Awaitable[Any]]


@dataclass(frozen=True)
class Service:
    """A service: its full name, which must be in the pool, and its methods."""

    name: str
    methods: Sequence[Method]


def handler_of(service: Service, counts: RequestCounts, tokens: Tokens | None = None) -> grpc.GenericRpcHandler:
    """Returns the handler of all methods of a service; with `tokens`, requests need one."""

    def answering(route: str, method: Method) -> Any:
        async def answer(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            began_s, code = counts.clock_s(), grpc.StatusCode.OK
            try:
                authorization = _authorization(context)
                if tokens is not None:
                    tokens.require(authorization, READ)
                headers = [] if authorization is None else [(b"authorization", authorization.encode("latin-1"))]
                return await method.answer(_parsed(method.request, data), headers)
            except SpringtideError as error:
                code = CODES.get(error.http_status, grpc.StatusCode.INTERNAL)
                context.set_trailing_metadata([(name.decode(), value) for name, value in error.http_headers])
                await _refuse(context, code, str(error))
            except Exception:  # noqa: BLE001 - the edge of the process: logged and counted, others are answered
                code = grpc.StatusCode.INTERNAL
                _log.exception("a request for %s failed", route)
                await _refuse(context, code, "the worker failed; its log has the cause")
            finally:
                counts.count(route, code.name, began_s)

        return answer

    methods = {
        method.name: grpc.unary_unary_rpc_method_handler(
            answering(f"/{service.name}/{method.name}", method),
            response_serializer=lambda answer: answer.SerializeToString(),
        )
        for method in service.methods
    }
    return grpc.method_handlers_generic_handler(service.name, methods)


def _parsed(name: str, data: bytes) -> Any:
    """Parses a request; if grpc parsed it, an invalid message would count as a server failure."""
    if not name:
        return data
    try:
        return message(name).FromString(data)
    except DecodeError:
        raise BadRequest(f"the request is no message {name}", "send one, as the .proto files have it") from None


def _authorization(context: grpc.aio.ServicerContext[Any, Any]) -> str | None:
    authorization = dict(context.invocation_metadata() or ()).get("authorization")
    return authorization.decode("latin-1") if isinstance(authorization, bytes) else authorization


async def _refuse(context: grpc.aio.ServicerContext[Any, Any], code: grpc.StatusCode, details: str) -> NoReturn:
    await context.abort(code, details)
    raise AssertionError("abort raises")


class GrpcHealth(health_pb2_grpc.HealthServicer):
    """The standard gRPC health service: reports SERVING while the worker can answer, like `/readyz`.

    It replaces `grpc_health`'s, whose watchers of a service miss updates once one of them leaves, and keep the
    server from stopping. `services` are the names besides the empty one, which is the whole worker.
    """

    def __init__(self, ready: Callable[[], bool], services: Collection[str]) -> None:
        self._ready, self._services = ready, {"", *services}
        self._is_ready = self._ended = False
        self._changed = asyncio.Event()

    def poll(self) -> None:
        """Notifies watchers if the worker's status has changed."""
        ready = self._ready()
        if ready != self._is_ready:
            self._is_ready = ready
            self._notify()

    async def follow(self) -> None:
        """Polls until it is cancelled."""
        while True:
            self.poll()
            await asyncio.sleep(HEALTH_S)

    def end(self) -> None:
        """Reports NOT_SERVING to all watchers, then ends their watches."""
        self._is_ready, self._ended = False, True
        self._notify()

    async def Check(self, request: HealthCheckRequest, context: Any) -> Any:
        """Returns the current status of the worker or of one service."""
        self.poll()
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service[:200]!r}")
        return HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: HealthCheckRequest, context: Any) -> None:
        """Sends the current status, and then each change."""
        sent: int | None = None
        while True:
            changed, ended, status = self._changed, self._ended, self._status(request.service)
            if status != sent:
                # No lock is held during this write: the client may never read.
                await context.write(HealthCheckResponse(status=status))
                sent = status
            if ended:
                return
            await changed.wait()

    def _status(self, service: str) -> int:
        if service not in self._services:
            return int(HealthCheckResponse.SERVICE_UNKNOWN)
        return int(HealthCheckResponse.SERVING if self._is_ready else HealthCheckResponse.NOT_SERVING)

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


@dataclass(frozen=True)
class GrpcAddress:
    """Where a gRPC server listens: `host:port`; port 0 selects a free one.

    Above `most_calls` concurrent calls, including watching ones, further calls are refused.
    """

    address: str
    shared: bool
    most_calls: int


class GrpcServer:
    """Answers until `stop`; made and used in one event loop. `services` are those besides health and reflection.

    Raises:
        RuntimeError: The address cannot be bound.
    """

    def __init__(
        self,
        services: Sequence[Service],
        counts: RequestCounts,
        ready: Callable[[], bool],
        access: Access,
        listen: GrpcAddress,
    ) -> None:
        self._access, self._listen = access, listen
        self._handlers = [handler_of(service, counts, access.tokens) for service in services]
        names = [service.name for service in services]
        self._listed: Sequence[str] = (*names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        self._health = GrpcHealth(ready, names)
        self._server, self.port = self._bound(listen.address)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Accepts requests from now on."""
        self._health.poll()
        await self._server.start()
        self._tasks = [asyncio.create_task(self._health.follow()), asyncio.create_task(self._keep())]

    def poll(self) -> None:
        """Notifies watching clients if the worker's readiness has changed."""
        self._health.poll()

    async def stop(self, grace_s: float) -> None:
        """Stops accepting requests, notifies watchers, and returns after open requests are answered or `grace_s` is
        over.
        """
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._health.end()
        await self._server.stop(grace_s)

    def _bound(self, address: str) -> tuple[grpc.aio.Server, int]:
        """Returns a server that has the port of the address, and the port."""
        options = [
            # By default grpc shares its port with other processes.
            ("grpc.so_reuseport", int(self._listen.shared)),
            ("grpc.max_receive_message_length", MOST_MESSAGE_BYTES),
            ("grpc.max_send_message_length", -1),
        ]
        server = grpc.aio.server(options=options, maximum_concurrent_rpcs=self._listen.most_calls)
        server.add_generic_rpc_handlers(self._handlers)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(self._listed, server, POOL)
        certificate = self._access.certificate
        if certificate is None:
            return server, server.add_insecure_port(address)

        def newest() -> grpc.ServerCertificateConfiguration:
            # Each handshake has the certificate that was loaded last.
            return grpc.ssl_server_certificate_configuration([certificate.pem])

        return server, server.add_secure_port(address, grpc.dynamic_ssl_server_credentials(newest(), newest))

    async def _keep(self) -> None:
        """Restarts the server if it ended by itself: grpc's does so at a request whose path is not UTF-8."""
        address = f"{self._listen.address.rpartition(':')[0]}:{self.port}"
        while True:
            # Raises what the server ended with. Without a time limit, a cancelled wait would end the server's shutdown.
            with suppress(Exception):
                while await self._server.wait_for_termination(POLL_S):
                    pass
            with suppress(Exception):
                await self._server.stop(0)
            _log.error("the gRPC server ended at a request that it could not read, and is restarted")
            while True:
                try:
                    self._server, self.port = self._bound(address)
                    break
                except RuntimeError:
                    await asyncio.sleep(AGAIN_S)
            await self._server.start()
