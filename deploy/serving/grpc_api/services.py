"""gRPC services: declares methods, creates their handlers, reports errors and counts requests."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from deploy.serving.edge.tokens import READ, Tokens
from deploy.serving.grpc_api.messages import message
from deploy.serving.request_counts import RequestCounts
from state.errors import BadRequest, Overloaded, SpringtideError
from state.metrics import WorkerMetrics

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
"""gRPC status codes by the HTTP status of an error."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """A method of a service.

    Attributes:
        name: The name in the `.proto` file.
        request: The full name of the request's message; empty if `answer` takes the raw bytes.
        answer: Answers a request, or raises an error.
    """

    name: str
    request: str
    answer: Callable[[Any], Awaitable[Any]]


@dataclass(frozen=True)
class Service:
    """A service: its full name, which must be in the pool of `messages`, and its methods."""

    name: str
    methods: Sequence[Method]


class Handlers:
    """Creates gRPC handlers for services.

    Args:
        metrics: The worker's metrics.
        tokens: The tokens that requests need; None if they need none.
        version: The version that the worker last answered with; None before its first answer.
        clock_s: A monotonic clock.
    """

    def __init__(
        self,
        metrics: WorkerMetrics,
        tokens: Tokens | None = None,
        version: Callable[[], int | None] = lambda: None,
        clock_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._tokens, self._counts = tokens, RequestCounts(metrics, version, clock_s)

    def of(self, service: Service) -> grpc.GenericRpcHandler:
        """Returns the handlers of all methods of a service."""
        return grpc.method_handlers_generic_handler(
            service.name,
            {
                one.name: grpc.unary_unary_rpc_method_handler(
                    self._answering(f"/{service.name}/{one.name}", one),
                    response_serializer=_serialized,
                )
                for one in service.methods
            },
        )

    def _answering(self, route: str, method: Method) -> Any:
        async def answering(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            began_s, code = self._counts.clock_s(), grpc.StatusCode.OK
            try:
                if self._tokens is not None:
                    self._tokens.require(_authorization(context), READ)
                return await method.answer(_read(method.request, data))
            except SpringtideError as error:
                code = CODES.get(error.http_status, grpc.StatusCode.INTERNAL)
                if isinstance(error, Overloaded):
                    context.set_trailing_metadata([(name.decode(), value) for name, value in error.http_headers])
                await _refuse(context, code, str(error))
            except Exception:  # noqa: BLE001 - the edge of the process: logged and counted, others are answered
                code = grpc.StatusCode.INTERNAL
                _log.exception("a request for %s failed", route)
                await _refuse(context, code, "the worker failed; its log says why")
            finally:
                self._counts.count(route, code.name, began_s)

        return answering


def _read(name: str, data: bytes) -> Any:
    """Parses a request. If grpc parsed it, an invalid message would be reported as a server failure.

    Raises:
        BadRequest: The data is not a valid message.
    """
    if not name:
        return data
    try:
        return message(name).FromString(data)
    except DecodeError:
        raise BadRequest(f"the request is no message {name}", "send one, as the .proto files have it") from None


def _authorization(context: grpc.aio.ServicerContext[Any, Any]) -> str | None:
    found = dict(context.invocation_metadata() or ()).get("authorization")
    return found.decode("latin-1") if isinstance(found, bytes) else found


async def _refuse(context: grpc.aio.ServicerContext[Any, Any], code: grpc.StatusCode, details: str) -> NoReturn:
    await context.abort(code, details)
    raise AssertionError("abort raises")


def _serialized(answer: Any) -> bytes:
    data: bytes = answer.SerializeToString()
    return data
