"""A worker's HTTP API, as an ASGI application: routes requests, answers them, reports errors and counts.

Errors are JSON. `error` says what happened, `do` says what to do, and `where` names the position in
the request if the request is at fault. `API.md` in this directory documents the API for callers.

Profiles and explanations:

    GET  /v1/profiles/{user_id}?item=&category=&at=&context.NAME=&fields=&top=
    POST /v1/profiles:batch      {"profiles": [{"user_id": ..., "item": ..., ...}, ...]} or {"users": [...]}, "fields", "top"
    GET  /v1/profiles/{user_id}/explain?label=|item=&category=&at=&context.NAME=&top=

Items for a user:

    POST /v1/rank      {"user_id": ..., "items": [...], "context": {...}, "at": ...}
    GET  /v1/recommendations/{user_id}?n=&category=&exclude_seen=&at=&context.NAME=
    GET  /v1/similar/{user_id}?n=&exclude_seen=&at=&context.NAME=

Segments:

    GET /v1/segments
    GET /v1/segments/{segment}?from=&n=
    GET /v1/segments/{segment}/users/{user_id}
    GET /v1/segments/{segment}/lookalikes?n=

Whether the worker runs and can answer, and its metrics:

    GET /healthz /readyz /metrics
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from prometheus_client import CollectorRegistry

from deploy.serving.edge.tokens import OPEN, OPERATE, Tokens
from deploy.serving.explaining.explaining import explain
from deploy.serving.exposition import told
from deploy.serving.host import Host
from deploy.serving.http_api.documents import Documents
from deploy.serving.http_api.endpoints import (
    ASKED,
    FAILED,
    LAST,
    METHODS,
    SENT,
    Endpoint,
    Receive,
    Request,
    Response,
    Routes,
    Scope,
    Send,
    answer,
    encode,
    failure,
    header,
)
from deploy.serving.http_api.item_requests import (
    RANK_EXAMPLE,
    NearParameters,
    RankQuestion,
    RecommendationParameters,
    near_question,
    rank_question,
    recommendation,
)
from deploy.serving.http_api.models import Models
from deploy.serving.http_api.requests import (
    BATCH,
    EXAMPLE,
    ExplanationParameters,
    ProfileParameters,
    explained,
    question,
    questions,
)
from deploy.serving.line import Line, QueueLimits
from deploy.serving.profile_batches import profile_batches
from deploy.serving.recommending.ranking import rank
from deploy.serving.recommending.recommending import recommend
from deploy.serving.recommending.similar import similar
from deploy.serving.recommending.turns import ItemTurns, in_turns
from deploy.serving.request_counts import RequestCounts
from deploy.serving.segments import SegmentLookalikes, SegmentPage, SegmentSizes, UserSegment
from deploy.serving.splitting.split import Split
from springtide_client.answers import (
    Alive,
    Explanation,
    Failure,
    Profile,
    Ranking,
    Readiness,
    Recommendations,
    SimilarItems,
)
from springtide_client.answers import Profiles as ProfilesAnswer
from state.config.sections import ServingSettings
from state.errors import SpringtideError, WorkerFailed
from state.metrics import WorkerMetrics
from state.segments.expression import NAME

MEMBERS = 100
MOST_MEMBERS = 1000
_NAMED: Mapping[str, Mapping[str, str]] = {"segment": {"pattern": f"^{NAME.pattern}$"}}
_PLAIN = "text/plain; version=0.0.4; charset=utf-8"
_NOTHING_GIVEN = ProfileParameters()
UNKNOWN = "unknown"
"""Metrics' label value of a request that matches no endpoint."""
Done = Callable[[Response], None]
_log = logging.getLogger(__name__)


class SegmentParameters(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The parameters of a segment's members."""

    start: Annotated[
        str, Meta(pattern="^[0-9a-f]{16}$", description="The pseudonym to begin with: `next` of the page before.")
    ] = msgspec.field(default="0" * 16, name="from")
    n: Annotated[int, Meta(ge=1, le=MOST_MEMBERS, description="How many members at most.")] = MEMBERS


class LookalikeParameters(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The parameters of the lookalikes of a segment."""

    n: Annotated[int, Meta(ge=1, le=MOST_MEMBERS, description="How many users at most.")] = MEMBERS


class Segments:
    """The endpoints that list segments and their members.

    Args:
        host: What answers.
    """

    def __init__(self, host: Host) -> None:
        self._host = host

    def endpoints(self) -> list[Endpoint]:
        """What is offered."""
        there, named = {**FAILED, 503: Failure}, {**FAILED, 404: Failure, 503: Failure}
        return [
            Endpoint(
                "segments",
                ("GET",),
                "/v1/segments",
                self._all,
                "All segments, and how many users are in each.",
                returns=(SegmentSizes,),
                failures=there,
            ),
            Endpoint(
                "segment",
                ("GET",),
                "/v1/segments/{segment}",
                self._one,
                "A segment, and some of its members.",
                parameters=SegmentParameters,
                returns=(SegmentPage,),
                failures=named,
                placeholders=_NAMED,
            ),
            Endpoint(
                "segment",
                ("GET",),
                "/v1/segments/{segment}/users/{user_id}",
                self._user,
                "Whether a user is in a segment.",
                returns=(UserSegment,),
                failures=named,
                placeholders=_NAMED,
            ),
            Endpoint(
                "lookalikes",
                ("GET",),
                "/v1/segments/{segment}/lookalikes",
                self._near,
                "The users nearest to the members of a segment, as they were listed last.",
                parameters=LookalikeParameters,
                returns=(SegmentLookalikes,),
                failures=named,
                placeholders=_NAMED,
            ),
        ]

    async def _all(self, request: Request) -> Response:
        return Response(200, encode(self._host.segments.sizes()))

    async def _one(self, request: Request) -> Response:
        asked = request.parameters(SegmentParameters)
        return Response(200, encode(self._host.segments.page(request.path["segment"], int(asked.start, 16), asked.n)))

    async def _user(self, request: Request) -> Response:
        return Response(200, encode(self._host.segments.of_user(request.path["segment"], request.path["user_id"])))

    async def _near(self, request: Request) -> Response:
        asked = request.parameters(LookalikeParameters)
        return Response(200, encode(self._host.segments.lookalikes(request.path["segment"], asked.n)))


class Items:
    """The endpoints that answer items.

    Args:
        host: What answers.
        metrics: Of the worker.
        limits: How long a question may wait.
    """

    def __init__(self, host: Host, metrics: WorkerMetrics, limits: QueueLimits) -> None:
        self._host, self._metrics, self._turns, self._line = host, metrics, ItemTurns(host), Line(limits)

    def endpoints(self) -> list[Endpoint]:
        """What is offered."""
        return [
            Endpoint(
                "rank",
                ("POST",),
                "/v1/rank",
                self._rank,
                "Items that the caller names, ranked for one user; by bids and with frequency caps where they have some.",
                body=(RankQuestion,),
                example=RANK_EXAMPLE,
                returns=(Ranking,),
                failures=SENT,
            ),
            Endpoint(
                "recommendations",
                ("GET",),
                "/v1/recommendations/{user_id}",
                self._recommend,
                "Items for one user, each with its reason.",
                parameters=RecommendationParameters,
                returns=(Recommendations,),
            ),
            Endpoint(
                "similar",
                ("GET",),
                "/v1/similar/{user_id}",
                self._similar,
                "The items nearest to one user by what was learned of both.",
                parameters=NearParameters,
                returns=(SimilarItems,),
                failures={**ASKED, 501: Failure},
            ),
        ]

    async def _rank(self, request: Request) -> Response:
        query, items = rank_question(await request.document())
        answer = await in_turns(rank(self._host.predictor(), query, items, self._host.impressions), self._line)
        self._metrics.cold_starts.inc(answer.cold_start)
        return Response(200, encode(answer))

    async def _recommend(self, request: Request) -> Response:
        query, wanted = recommendation(request.path["user_id"], request.parameters(RecommendationParameters))
        answer = await in_turns(recommend(self._host.predictor(), self._turns.sources(), query, wanted), self._line)
        self._metrics.cold_starts.inc(answer.cold_start)
        return Response(200, encode(answer))

    async def _similar(self, request: Request) -> Response:
        query, wanted = near_question(request.path["user_id"], request.parameters(NearParameters))
        answer = similar(self._host.predictor(), self._turns.sources().near, query, wanted)
        self._metrics.cold_starts.inc(answer.cold_start)
        return Response(200, encode(answer))


class Health:
    """The endpoints that speak of the worker.

    Args:
        host: What answers.
        told_metrics: Renders /metrics.
        draining: Whether the worker is about to end.
    """

    def __init__(self, host: Host, told_metrics: CollectorRegistry, draining: Callable[[], bool]) -> None:
        self._host, self._told_metrics, self._draining = host, told_metrics, draining

    def endpoints(self) -> list[Endpoint]:
        """What is offered."""
        return [
            Endpoint(
                "healthz",
                METHODS,
                "/healthz",
                self._alive,
                "That the process runs.",
                role=OPEN,
                returns=(Alive,),
                failures=FAILED,
            ),
            Endpoint(
                *("readyz", METHODS, "/readyz", self._ready, "Whether this worker can answer, and what it lacks."),
                role=OPEN,
                returns=(Readiness,),
                failures={**FAILED, 503: Readiness},
            ),
            Endpoint(
                *("metrics", METHODS, "/metrics", self._metrics, "Prometheus's text; OpenMetrics for who accepts it."),
                role=OPERATE,
                media_type=_PLAIN,
                failures=FAILED,
            ),
        ]

    async def _alive(self, _: Request) -> Response:
        return Response(200, b'{"status":"ok"}')

    async def _ready(self, _: Request) -> Response:
        if self._draining():
            return Response(503, encode({"ready": False, "error": "this worker is about to end", "do": "ask another"}))
        missing = self._host.missing()
        parts = {part: part not in missing for part in ("version", "program", "histories")}
        refused = self._host.refused()
        told: dict[str, object] = {}
        if refused is not None:
            told["refused"] = {"version": refused[0], "reason": refused[1]}
        if degraded := self._host.degraded():
            told["degraded"] = degraded
        if not missing:
            return Response(200, encode({"ready": True, **parts, **told}))
        reasons = "; ".join(f"{part}: {reason}" for part, reason in missing.items())
        return Response(
            503,
            encode(
                {
                    "ready": False,
                    **parts,
                    **told,
                    "error": f"not ready: {reasons}",
                    "do": "wait, or look at the applier's log",
                }
            ),
        )

    async def _metrics(self, request: Request) -> Response:
        body, media_type = told(self._told_metrics, header(request.scope, b"accept") or "")
        return Response(200, body, [(b"content-type", media_type.encode())])


class Profiles:
    """The endpoints that answer profiles.

    Args:
        host: What answers.
        metrics: Of the worker.
        limits: How long a question may wait.
    """

    def __init__(self, host: Host, metrics: WorkerMetrics, limits: QueueLimits) -> None:
        self._batcher = profile_batches(host, metrics, lambda answer: encode(answer.document()), limits)

    def endpoints(self) -> list[Endpoint]:
        """What is offered."""
        return [
            Endpoint(
                "profile",
                ("GET",),
                "/v1/profiles/{user_id}",
                self._one,
                "One user's profile.",
                parameters=ProfileParameters,
                returns=(Profile,),
                soon=self._soon,
            ),
            Endpoint(
                "batch",
                ("POST",),
                "/v1/profiles:batch",
                self._many,
                "Profiles of many users, in the order they were asked for, all of one version.",
                body=BATCH,
                example=EXAMPLE,
                returns=(ProfilesAnswer,),
                failures=SENT,
            ),
        ]

    async def _one(self, request: Request) -> Response:
        return Response(200, await self._soon(request))

    def _soon(self, request: Request) -> asyncio.Future[bytes]:
        given = request.parameters(ProfileParameters) if request.query_string else _NOTHING_GIVEN
        return self._batcher.one(question(request.path["user_id"], given))

    async def _many(self, request: Request) -> Response:
        answers = await self._batcher.many(questions(await request.document()))
        return Response(200, b'{"profiles":[' + b",".join(answers) + b"]}")


class Explanations:
    """The endpoint that explains an answer.

    Args:
        host: What answers.
        metrics: Of the worker.
        limits: How long a question may wait.
    """

    def __init__(self, host: Host, metrics: WorkerMetrics, limits: QueueLimits) -> None:
        self._host, self._metrics, self._line = host, metrics, Line(limits)

    def endpoints(self) -> list[Endpoint]:
        """What is offered."""
        return [
            Endpoint(
                "explain",
                ("GET",),
                "/v1/profiles/{user_id}/explain",
                self._explain,
                "Why a probability of a profile is what it is.",
                parameters=ExplanationParameters,
                returns=(Explanation,),
            )
        ]

    async def _explain(self, request: Request) -> Response:
        given = request.parameters(ExplanationParameters)
        answer = await in_turns(
            explain(self._host.predictor(), explained(request.path["user_id"], given), given.label), self._line
        )
        self._metrics.cold_starts.inc(answer.cold_start)
        return Response(200, encode(answer))


class App:
    """The ASGI application.

    Args:
        host: What answers.
        registry: Where the metrics are.
        serving: The limits of requests.
        told_metrics: Renders /metrics; None for `registry`.
        tokens: That requests need; None where they need none.
        clock_s: A monotonic clock.
        split: Answers a share of the users from a trial; None if this host takes part in no rollout.

    Attributes:
        host: What answers.
        metrics: Of the worker.
        limits: How long a question may wait.
        draining: Whether the worker is about to end: answers then end their connections.
    """

    def __init__(
        self,
        host: Host,
        registry: CollectorRegistry,
        serving: ServingSettings = ServingSettings(),  # noqa: B008 - immutable
        told_metrics: CollectorRegistry | None = None,
        tokens: Tokens | None = None,
        clock_s: Callable[[], float] = time.perf_counter,
        split: Split | None = None,
    ) -> None:
        self.host = host
        self._most_body_bytes = serving.max_body_bytes
        self._tokens = tokens
        self._split = split
        self.draining = False
        self.limits = QueueLimits(serving.max_queue_ms / 1000, serving.timeout_s)
        self.metrics = WorkerMetrics(registry)
        self._counts = RequestCounts(self.metrics, lambda: host.version, clock_s)
        self.endpoints: list[Endpoint] = [
            *Profiles(host, self.metrics, self.limits).endpoints(),
            *Explanations(host, self.metrics, self.limits).endpoints(),
            *Items(host, self.metrics, self.limits).endpoints(),
            *Health(host, told_metrics or registry, lambda: self.draining).endpoints(),
            *Models(host, self.metrics, self.limits).endpoints(),
            *Segments(host).endpoints(),
        ]
        self.endpoints += Documents(self.endpoints).endpoints()
        self._routes = Routes(self.endpoints)

    def ready(self) -> bool:
        """Whether this worker can answer and is not about to end."""
        return not self.draining and not self.host.missing()

    def count_refused(self, reason: str) -> None:
        """Counts a connection or a request that was refused at the door."""
        self.metrics.refused.labels(reason).inc()

    def close(self) -> None:
        """Closes the stores; the next request opens them again."""
        self.host.close()
        if self._split is not None:
            self._split.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        response = asyncio.get_running_loop().create_future()
        answering = self.respond(scope, receive, response.set_result)
        if answering is not None:
            await answering
        await answer(send, await response)

    def respond(self, scope: Scope, receive: Receive, done: Done) -> Coroutine[Any, Any, None] | None:
        """Answers one request with minimal overhead: the endpoint of a profile needs no task.

        Args:
            scope: Of ASGI.
            receive: Likewise.
            done: Called with the response, in a later iteration of the event loop.

        Returns:
            What is to be awaited; None where nothing is.
        """
        began_s, name = self._counts.clock_s(), UNKNOWN
        try:
            endpoint, placeholders = self._routes.find(scope)
            name = endpoint.name
            if self._tokens is not None:
                self._tokens.require(header(scope, b"authorization"), endpoint.role)
            request = Request(scope, receive, placeholders, endpoint, self._most_body_bytes)
            if endpoint.soon is None or self._split is not None:
                return self._answer(request, done, began_s)
            body = endpoint.soon(request)
        except Exception as error:  # noqa: BLE001 - as of `_failure`
            response = self._failure(name, error)
            asyncio.get_running_loop().call_soon(lambda: done(self._counted(name, response, began_s)))
            return None

        def end(answered: asyncio.Future[bytes]) -> None:
            try:
                response = Response(200, answered.result())
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - as of `_failure`
                response = self._failure(name, error)
            done(self._counted(name, response, began_s))

        body.add_done_callback(end)
        return None

    async def _answer(self, request: Request, done: Done, began_s: float) -> None:
        name = request.endpoint.name
        try:
            response = await (request.endpoint.answer if self._split is None else self._split.answer)(request)
        except Exception as error:  # noqa: BLE001 - as of `_failure`
            response = self._failure(name, error)
        done(self._counted(name, response, began_s))

    def _failure(self, name: str, error: BaseException) -> Response:
        """What an error is answered with: at the edge of the process others are logged, and further requests answered."""
        if isinstance(error, SpringtideError):
            return failure(error)
        _log.error("a request for %s failed", name, exc_info=error)
        return failure(WorkerFailed("the worker failed; its log says why", "report it with the worker's log"))

    def _counted(self, name: str, response: Response, began_s: float) -> Response:
        self._counts.count(name, response.status, began_s)
        return response._replace(headers=[*response.headers, LAST]) if self.draining else response
