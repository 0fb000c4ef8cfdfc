"""A worker's gRPC server: its services, health and reflection, on the worker's own event loop.

The service `springtide.v1.Profiles` gives the same answers about profiles and items as HTTP, from
the same core.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from deploy.serving.answer import Answer, Query
from deploy.serving.edge.access import Access
from deploy.serving.edge.tls import Certificate
from deploy.serving.explaining.explaining import explain
from deploy.serving.grpc_api.health import GrpcHealth
from deploy.serving.grpc_api.messages import POOL, message
from deploy.serving.grpc_api.model_services import model_services
from deploy.serving.grpc_api.services import Handlers, Method, Service
from deploy.serving.host import Host
from deploy.serving.http_api.item_requests import MOST_RECOMMENDED, RECOMMENDED
from deploy.serving.http_api.requests import LATEST_MS, LEAN, MOST_PROFILES, MOST_TOP, TOP, fields_of, whole
from deploy.serving.line import Line, QueueLimits
from deploy.serving.profile_batches import profile_batches
from deploy.serving.recommending.advertising import Cap
from deploy.serving.recommending.ranking import MOST_ITEMS, CappedItems, NamedItem, RankedItems, rank
from deploy.serving.recommending.recommending import Recommendations, WantedItems, recommend
from deploy.serving.recommending.similar import NearWanted, SimilarItems, similar
from deploy.serving.recommending.turns import ItemTurns, in_turns
from state.errors import BadRequest
from state.metrics import WorkerMetrics

PACKAGE = "springtide.v1"
MOST_MESSAGE_BYTES = 4 << 20
LOOK_S = 0.2
"""Interval of polls for the server's end; while a call is open, only a poll notices it."""
AGAIN_S = 0.05
"""Wait before the next attempt to bind the port of a server that ended."""
_log = logging.getLogger(__name__)


class GrpcProfiles:
    """Answers the methods of the service.

    Args:
        host: What answers.
        metrics: Of the worker.
        limits: How long a question may wait.
    """

    def __init__(self, host: Host, metrics: WorkerMetrics, limits: QueueLimits) -> None:
        self._host, self._metrics, self._turns, self._line = host, metrics, ItemTurns(host), Line(limits)
        self._batcher = profile_batches(host, metrics, _profile, limits)

    def service(self) -> Service:
        """What is offered."""
        methods = {
            "GetProfile": self._one,
            "BatchGetProfiles": self._many,
            "Rank": self._rank,
            "Recommend": self._recommend,
            "Explain": self._explain,
            "Similar": self._similar,
        }
        return Service(
            f"{PACKAGE}.Profiles",
            [Method(name, f"{PACKAGE}.{name}Request", answer) for name, answer in methods.items()],
        )

    async def _one(self, request: Any) -> Any:
        return await self._batcher.one(_query(request.question, _asked(request)))

    async def _many(self, request: Any) -> Any:
        asked = _asked(request)
        if not 1 <= len(request.questions) <= MOST_PROFILES:
            raise BadRequest(f"{len(request.questions)} questions", f"ask 1 to {MOST_PROFILES} at once")
        answers = await self._batcher.many([_query(one, asked) for one in request.questions])
        return _message("BatchGetProfilesResponse")(profiles=answers)

    async def _rank(self, request: Any) -> Any:
        if not 1 <= len(request.items) <= MOST_ITEMS:
            raise BadRequest(f"{len(request.items)} items", f"name 1 to {MOST_ITEMS} at once")
        items = [_named(one) for one in request.items]
        query = _query(request, (LEAN, 0))
        answer = await in_turns(rank(self._host.predictor(), query, items, self._host.impressions), self._line)
        left_out = {"left_out": answer.left_out} if isinstance(answer, CappedItems) else {}
        return self._of_items("RankResponse", answer, **left_out)

    async def _recommend(self, request: Any) -> Any:
        wanted = WantedItems(_count(request), _given(request, "category"), request.exclude_seen)
        sources = self._turns.sources()
        answer = await in_turns(
            recommend(self._host.predictor(), sources, _query(request, (LEAN, None)), wanted), self._line
        )
        return self._of_items("RecommendResponse", answer)

    async def _explain(self, request: Any) -> Any:
        top = whole("top", request.top if request.HasField("top") else TOP, 1, MOST_TOP)
        query, label = _query(request.question, (LEAN, top)), _given(request, "label")
        answer = await in_turns(explain(self._host.predictor(), query, label), self._line)
        self._metrics.cold_starts.inc(answer.cold_start)
        return _message("Explanation")(**dataclasses.asdict(answer))

    async def _similar(self, request: Any) -> Any:
        wanted, near = NearWanted(_count(request), request.exclude_seen), self._turns.sources().near
        answer = similar(self._host.predictor(), near, _query(request, (LEAN, 0)), wanted)
        return self._of_items("SimilarResponse", answer)

    def _of_items(self, name: str, answer: RankedItems | Recommendations | SimilarItems, **more: Any) -> Any:
        self._metrics.cold_starts.inc(answer.cold_start)
        return _message(name)(
            user_id=answer.user_id,
            known=answer.known,
            cold_start=answer.cold_start,
            version=dict(answer.version),
            at=answer.at,
            at_ms=answer.at_ms,
            clock=answer.clock,
            items=[dict(one) for one in answer.items],
            **more,
        )


def _message(name: str) -> Any:
    return message(f"{PACKAGE}.{name}")


def _profile(answer: Answer) -> Any:
    return _message("Profile")(**_without_nothing(answer.document()))


def _asked(request: Any) -> tuple[frozenset[str], int | None]:
    """The fields and the number of interests that are asked for."""
    return fields_of(list(request.fields)), whole("top", request.top if request.HasField("top") else TOP, 1, MOST_TOP)


def _query(one: Any, asked: tuple[frozenset[str], int | None]) -> Query:
    """The question of a message that has `user_id`, `at_ms` and `context`.

    Raises:
        BadRequest: It names no user, or no time of the years 1970 to 9999.
    """
    if not one.user_id:
        raise BadRequest("a question names no user_id", "name a user")
    at_ms = whole("at_ms", one.at_ms, 0, LATEST_MS) if one.HasField("at_ms") else None
    about = ("item", "category") if one.DESCRIPTOR.name == "Question" else ()
    item, category = (_given(one, name) for name in about) if about else (None, None)
    return Query(one.user_id, item, category, dict(one.context), at_ms, *asked)


def _count(request: Any) -> int:
    """How many items are wanted."""
    return whole("n", request.n if request.HasField("n") else RECOMMENDED, 1, MOST_RECOMMENDED)


def _named(one: Any) -> NamedItem:
    """An item to rank."""
    cap = Cap(one.cap.count, one.cap.within_s) if one.HasField("cap") else None
    return NamedItem(one.item, _given(one, "category"), _given(one, "bid"), cap)


def _given(one: Any, name: str) -> Any:
    return getattr(one, name) if one.HasField(name) else None


def _without_nothing(document: dict[str, Any]) -> dict[str, Any]:
    """The fields of a message with the same names: a map without missing values, lists in place of arrays."""
    found = dict(document)
    if "vector" in found:
        found["vector"] = found["vector"].tolist()
    for owner in (found, found.get("engagement")):
        if owner is not None and "attributes" in owner:
            owner["attributes"] = {name: text for name, text in owner["attributes"].items() if text is not None}
    return found


def offered(host: Host, metrics: WorkerMetrics, limits: QueueLimits) -> list[Service]:
    """The services of a worker; another one is added here."""
    return [GrpcProfiles(host, metrics, limits).service(), *model_services(host, metrics, limits)]


class GrpcServer:
    """Answers until `stop`; made and used in one event loop.

    Args:
        host: What answers.
        metrics: Of the worker.
        address: `host:port` to listen on; port 0 selects a free one.
        shared: Whether other workers listen there too.
        limits: How long a question may wait.
        ready: Whether the worker can answer.
        access: How clients are let in.
        most_calls: Concurrent calls, watching ones included; further ones are refused.

    Attributes:
        port: That it listens on.

    Raises:
        RuntimeError: The address cannot be bound.
    """

    def __init__(
        self,
        host: Host,
        metrics: WorkerMetrics,
        address: str,
        shared: bool,
        limits: QueueLimits,
        ready: Callable[[], bool],
        access: Access,
        most_calls: int,
    ) -> None:
        self._address, self._shared, self._access, self._most_calls = address, shared, access, most_calls
        services, handlers = offered(host, metrics, limits), Handlers(metrics, access.tokens, lambda: host.version)
        self._handlers = [handlers.of(one) for one in services]
        names = [one.name for one in services]
        self._listed: Sequence[str] = (*names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        self._health = GrpcHealth(ready, names)
        self._server, self.port = self._made(address)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Takes requests from now on."""
        self._health.look()
        await self._server.start()
        self._tasks = [asyncio.create_task(self._health.follow()), asyncio.create_task(self._keep())]

    def look(self) -> None:
        """Notifies watching clients at once when the worker becomes ready or stops being ready."""
        self._health.look()

    async def stop(self, grace_s: float) -> None:
        """Stops accepting requests, notifies watching clients, and returns when open requests are answered or `grace_s` is over."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._health.end()
        await self._server.stop(grace_s)

    def _made(self, address: str) -> tuple[grpc.aio.Server, int]:
        """A server that has the port of the address, and the port."""
        options = [
            # By default grpc shares its port with other processes.
            ("grpc.so_reuseport", int(self._shared)),
            ("grpc.max_receive_message_length", MOST_MESSAGE_BYTES),
            ("grpc.max_send_message_length", -1),
        ]
        server = grpc.aio.server(options=options, maximum_concurrent_rpcs=self._most_calls)
        server.add_generic_rpc_handlers(self._handlers)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(self._listed, server, POOL)
        if self._access.certificate is None:
            return server, server.add_insecure_port(address)
        return server, server.add_secure_port(address, _credentials(self._access.certificate))

    async def _keep(self) -> None:
        """Restarts the server if it ended by itself: grpc's does so at a request whose path is not UTF-8."""
        address = f"{self._address.rpartition(':')[0]}:{self.port}"
        while True:
            # It raises what it ended with, whatever that was. Without a time limit a cancelled wait would end its end.
            with suppress(Exception):
                while await self._server.wait_for_termination(LOOK_S):
                    pass
            with suppress(Exception):
                await self._server.stop(0)
            _log.error("the gRPC server ended at a request that it could not read, and is begun anew")
            while True:
                try:
                    self._server, self.port = self._made(address)
                    break
                except RuntimeError:
                    await asyncio.sleep(AGAIN_S)
            await self._server.start()


def _credentials(certificate: Certificate) -> grpc.ServerCredentials:
    """Each handshake has the certificate that was loaded last."""

    def newest() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([certificate.pem])

    return grpc.dynamic_ssl_server_credentials(newest(), newest)
