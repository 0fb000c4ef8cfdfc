"""The endpoints of a worker: profiles, items, explanations and segments, over HTTP and gRPC, and its health.

`docs/reference/api.md` documents the API for callers. gRPC gives the same answers as HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar
from urllib.parse import quote, urlencode

import msgspec
import numpy as np
import orjson
from google.protobuf import json_format
from google.protobuf.message import Message
from msgspec import Meta
from prometheus_client import CollectorRegistry

from deploy.serving.answers.explaining import explain
from deploy.serving.answers.host import Answers, Host
from deploy.serving.answers.items import rank, recommend, similar
from deploy.serving.requests.access import OPEN, OPERATE
from deploy.serving.requests.grpc_server import Method, Service, message
from deploy.serving.requests.http import (
    ASKED,
    FAILED,
    METHODS,
    SENT,
    Endpoint,
    Headers,
    Request,
    Response,
    encode,
    error_in,
    header,
    what_and_where,
)
from deploy.serving.requests.parameters import (
    BATCH_EXAMPLE,
    RANK_EXAMPLE,
    ExplanationParameters,
    NearParameters,
    ProfileParameters,
    ProfilesQuestion,
    RankQuestion,
    RecommendationParameters,
    UsersQuestion,
)
from deploy.serving.requests.routing import Router, whole
from deploy.serving.requests.worker_metrics import rendered
from springtide_client import answers as responses
from state.disk import documents
from state.errors import BadRequest
from state.registry.hosts import RoutingTable
from state.segments import NAME

MOST_MEMBERS = 1000
PACKAGE = "springtide.v1"
PLAIN = "text/plain; version=0.0.4; charset=utf-8"
_NO_PARAMETERS = ProfileParameters()
_SEGMENT: Mapping[str, Mapping[str, str]] = {"segment": {"pattern": f"^{NAME.pattern}$"}}
Parameters = TypeVar("Parameters", bound=msgspec.Struct)


class SegmentParameters(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The parameters of a segment's members."""

    start: Annotated[
        str, Meta(pattern="^[0-9a-f]{16}$", description="The pseudonym to begin with: `next` of the page before.")
    ] = msgspec.field(default="0" * 16, name="from")
    n: Annotated[int, Meta(ge=1, le=MOST_MEMBERS, description="How many members at most.")] = 100


class LookalikeParameters(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The parameters of the lookalikes of a segment."""

    n: Annotated[int, Meta(ge=1, le=MOST_MEMBERS, description="How many users at most.")] = 100


class Questions:
    """Questions about one user, independent of the protocol."""

    def __init__(self, answers: Answers) -> None:
        self._answers, self._host = answers, answers.host

    async def rank(self, question: RankQuestion) -> responses.Ranking:
        """Ranks the items that the caller names."""
        items, impressions = question.named_items(), self._host.impressions
        return await self._answers.run(rank(self._host.predictor(), question.query(), items, impressions))

    async def recommend(self, user: str, parameters: RecommendationParameters) -> responses.Recommendations:
        """Recommends items."""
        query, sources, host = parameters.query(user), self._answers.sources(), self._host
        wanted = parameters.wanted()._replace(per_category=host.serving.per_category)
        return await self._answers.run(recommend(host.predictor(), sources, query, wanted, host.impressions))

    async def similar(self, user: str, parameters: NearParameters) -> responses.SimilarItems:
        """Finds the nearest items."""
        near = self._answers.sources().near
        return self._answers.counted(similar(self._host.predictor(), near, parameters.query(user), parameters.wanted()))

    async def explain(self, user: str, parameters: ExplanationParameters) -> responses.Explanation:
        """Explains a probability."""
        return await self._answers.run(explain(self._host.predictor(), parameters.query(user), parameters.label))


def profile_endpoints(answers: Answers) -> list[Endpoint]:
    """Returns the endpoints that answer profiles, explanations and items."""
    questions = Questions(answers)

    def soon(request: Request) -> asyncio.Future[bytes]:
        parameters = request.parameters(ProfileParameters) if request.query_string else _NO_PARAMETERS
        return answers.profiles.one(parameters.query(request.path["user_id"]), encode)

    async def profile(request: Request) -> Response:
        return Response(200, await soon(request))

    async def batch(request: Request) -> Response:
        question = await request.document()
        return Response(
            200, b'{"profiles":[' + b",".join(await answers.profiles.many(question.queries(), encode)) + b"]}"
        )

    async def rank(request: Request) -> Response:
        return Response(200, encode(await questions.rank(await request.document())))

    def about_user(
        kind: type[Parameters], answer: Callable[[str, Parameters], Awaitable[responses.About]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def answered(request: Request) -> Response:
            return Response(200, encode(await answer(request.path["user_id"], request.parameters(kind))))

        return answered

    return [
        Endpoint(
            "profile",
            ("GET",),
            "/v1/profiles/{user_id}",
            profile,
            "One user's profile.",
            parameters=ProfileParameters,
            returns=(responses.Profile,),
            soon=soon,
        ),
        Endpoint(
            "batch",
            ("POST",),
            "/v1/profiles:batch",
            batch,
            "Profiles of many users, in the order of the request, all of one version.",
            body=(ProfilesQuestion, UsersQuestion),
            example=BATCH_EXAMPLE,
            returns=(responses.Profiles,),
            failures=SENT,
        ),
        Endpoint(
            "explain",
            ("GET",),
            "/v1/profiles/{user_id}/explain",
            about_user(ExplanationParameters, questions.explain),
            "Explains a probability of a profile.",
            parameters=ExplanationParameters,
            returns=(responses.Explanation,),
        ),
        Endpoint(
            "rank",
            ("POST",),
            "/v1/rank",
            rank,
            "Items that the caller names, ranked for one user; by bids and with frequency caps if they have some.",
            body=(RankQuestion,),
            example=RANK_EXAMPLE,
            returns=(responses.Ranking,),
            failures=SENT,
        ),
        Endpoint(
            "recommendations",
            ("GET",),
            "/v1/recommendations/{user_id}",
            about_user(RecommendationParameters, questions.recommend),
            "Items for one user, each with its reason.",
            parameters=RecommendationParameters,
            returns=(responses.Recommendations,),
        ),
        Endpoint(
            "similar",
            ("GET",),
            "/v1/similar/{user_id}",
            about_user(NearParameters, questions.similar),
            "The items nearest to a user, by the vectors of both.",
            parameters=NearParameters,
            returns=(responses.SimilarItems,),
            failures={**ASKED, 501: responses.Failure},
        ),
    ]


def profile_service(answers: Answers, endpoints: Sequence[Endpoint], router: Router | None) -> Service:
    """Returns the gRPC service `springtide.v1.Profiles`; through `router`, other hosts answer about their users over
    HTTP.
    """
    questions, by_name = Questions(answers), {endpoint.name: endpoint for endpoint in endpoints}

    async def profile(user: str, parameters: ProfileParameters) -> Any:
        query = parameters.query(user)
        # Refused here, because in a batch it would make the queries of other requests fail too.
        answers.host.predictor().users_of([query])
        return await answers.profiles.one(query, _profile_message)

    async def batch(fields: dict[str, Any]) -> Any:
        question = _convert({"profiles": [], **fields}, ProfilesQuestion)
        profiles = await answers.profiles.many(question.queries(), _profile_message)
        return message(f"{PACKAGE}.BatchGetProfilesResponse")(profiles=profiles)

    async def rank(fields: dict[str, Any]) -> Any:
        return await questions.rank(_convert({"items": [], **fields}, RankQuestion))

    def about_user(
        kind: type[Parameters], answer: Callable[[str, Parameters], Awaitable[Any]]
    ) -> Callable[[dict[str, Any]], Awaitable[Any]]:
        async def answered(fields: dict[str, Any]) -> Any:
            if not (user := fields.pop("user_id", "")):
                raise BadRequest("the request names no user_id", "name a user")
            return await answer(user, _convert(fields, kind))

        return answered

    def method(name: str, endpoint: Endpoint, local: Callable[[dict[str, Any]], Awaitable[Any]], kind: str) -> Method:
        async def answer(request: Message, headers: Headers) -> Any:
            fields = _fields_of(request)
            if endpoint.parameters is not None and "fields" in fields:
                fields["fields"] = ",".join(fields["fields"])
            if router is not None and not all(map(router.is_held, _users_in(fields))):
                return _message_of(await router.answer(_as_http(endpoint, fields, headers), endpoint.answer), kind)
            result = await local(fields)
            return result if isinstance(result, Message) else _filled(kind, result)

        return Method(name, f"{PACKAGE}.{name}Request", answer)

    return Service(
        f"{PACKAGE}.Profiles",
        [
            method("GetProfile", by_name["profile"], about_user(ProfileParameters, profile), "Profile"),
            method("BatchGetProfiles", by_name["batch"], batch, "BatchGetProfilesResponse"),
            method("Rank", by_name["rank"], rank, "RankResponse"),
            method(
                "Recommend",
                by_name["recommendations"],
                about_user(RecommendationParameters, questions.recommend),
                "RecommendResponse",
            ),
            method("Explain", by_name["explain"], about_user(ExplanationParameters, questions.explain), "Explanation"),
            method("Similar", by_name["similar"], about_user(NearParameters, questions.similar), "SimilarResponse"),
        ],
    )


def _fields_of(request: Message) -> dict[str, Any]:
    """Converts a message to the names and values of HTTP; absent fields are left out."""
    fields: dict[str, Any] = {}
    for field, value in request.ListFields():
        name = field.name
        if name == "at_ms":
            fields["at"] = str(value)
        elif name == "question":
            fields |= _fields_of(value)
        elif field.message_type is not None and field.message_type.GetOptions().map_entry:
            fields[name] = dict(value)
        elif field.message_type is not None:
            repeated = field.is_repeated
            converted = [_fields_of(element) for element in value] if repeated else _fields_of(value)
            fields["profiles" if name == "questions" else name] = converted
        else:
            fields[name] = list(value) if field.is_repeated else value
    return fields


def _users_in(fields: Mapping[str, Any]) -> list[str]:
    """Returns the users that a request names; one without a user is refused where it is answered."""
    return [question["user_id"] for question in fields.get("profiles", [fields]) if "user_id" in question]


def _as_http(endpoint: Endpoint, fields: dict[str, Any], headers: Headers) -> Request:
    """Returns the HTTP request of the same meaning."""
    user, query, body = "", "", b""
    if endpoint.body:
        body = msgspec.json.encode(fields)
    else:
        user = fields.pop("user_id")
        context = {f"context.{name}": text for name, text in fields.pop("context", {}).items()}
        query = urlencode(fields | context)
    path = endpoint.path.replace("{user_id}", quote(user, safe=""))
    scope = {
        "method": endpoint.methods[0],
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": headers,
    }
    return Request(scope, whole(body), {"user_id": user} if user else {}, endpoint)


def _message_of(response: Response, kind: str) -> Any:
    """Returns the message of an HTTP response, without fields that only a later release knows; raises its error."""
    if response.status != 200:
        raise error_in(response)
    document = orjson.loads(response.body)
    for profile in document.get("profiles", [document]):
        _drop_missing(profile)
    return json_format.ParseDict(document, message(f"{PACKAGE}.{kind}")(), ignore_unknown_fields=True)


def _convert(fields: Mapping[str, Any], kind: type[Parameters]) -> Parameters:
    try:
        return documents.convert(fields, kind)
    except msgspec.ValidationError as error:
        problem, where = what_and_where(error)
        raise BadRequest(f"{where.lstrip('/') or 'the request'}: {problem}", "correct it", where) from None


def _filled(name: str, answer: Any) -> Any:
    return message(f"{PACKAGE}.{name}")(**msgspec.to_builtins(answer))


def _profile_message(answer: responses.Profile) -> Any:
    """Returns the message of a profile: maps without missing values, lists in place of arrays."""
    document = msgspec.to_builtins(answer, enc_hook=np.ndarray.tolist)
    _drop_missing(document)
    return message(f"{PACKAGE}.Profile")(**document)


def _drop_missing(profile: dict[str, Any]) -> None:
    """Drops attributes without a value, which the maps of a message cannot have."""
    for owner in (profile, profile.get("engagement")):
        if owner is not None and "attributes" in owner:
            owner["attributes"] = {name: text for name, text in owner["attributes"].items() if text is not None}


def _answering(answer: Callable[[Request], Any]) -> Callable[[Request], Awaitable[Response]]:
    async def answered(request: Request) -> Response:
        return Response(200, encode(answer(request)))

    return answered


def segment_endpoints(host: Host) -> list[Endpoint]:
    """Returns the endpoints that list segments and their members."""

    def page(request: Request) -> responses.SegmentPage:
        parameters = request.parameters(SegmentParameters)
        return host.segments.page(request.path["segment"], int(parameters.start, 16), parameters.n)

    def of_user(request: Request) -> responses.UserSegment:
        return host.segments.of_user(request.path["segment"], request.path["user_id"])

    def lookalikes(request: Request) -> responses.SegmentLookalikes:
        return host.segments.lookalikes(request.path["segment"], request.parameters(LookalikeParameters).n)

    failures = {**FAILED, 404: responses.Failure, 503: responses.Failure}
    return [
        Endpoint(
            "segments",
            ("GET",),
            "/v1/segments",
            _answering(lambda _: host.segments.sizes()),
            "All segments, and how many users are in each.",
            returns=(responses.SegmentSizes,),
            failures={**FAILED, 503: responses.Failure},
        ),
        Endpoint(
            "segment",
            ("GET",),
            "/v1/segments/{segment}",
            _answering(page),
            "A segment, and some of its members.",
            parameters=SegmentParameters,
            returns=(responses.SegmentPage,),
            failures=failures,
            placeholders=_SEGMENT,
        ),
        Endpoint(
            "segment",
            ("GET",),
            "/v1/segments/{segment}/users/{user_id}",
            _answering(of_user),
            "Whether a user is in a segment.",
            returns=(responses.UserSegment,),
            failures=failures,
            placeholders=_SEGMENT,
        ),
        Endpoint(
            "lookalikes",
            ("GET",),
            "/v1/segments/{segment}/lookalikes",
            _answering(lookalikes),
            "The users nearest to the members of a segment, as they were listed last.",
            parameters=LookalikeParameters,
            returns=(responses.SegmentLookalikes,),
            failures=failures,
            placeholders=_SEGMENT,
        ),
    ]


def host_endpoints(table: Callable[[], RoutingTable]) -> list[Endpoint]:
    """Returns the endpoint of the routing table, which `table` returns."""

    def live(_: Request) -> responses.ServingHosts:
        return responses.ServingHosts([responses.ServingHost(entry.address, entry.shares) for entry in table().hosts])

    return [
        Endpoint(
            "hosts",
            ("GET",),
            "/v1/hosts",
            _answering(live),
            "The live hosts that hold parts of the users; none if each host holds all users.",
            returns=(responses.ServingHosts,),
            failures=FAILED,
        )
    ]


def health_endpoints(host: Host, registry: CollectorRegistry, draining: Callable[[], bool]) -> list[Endpoint]:
    """Returns the endpoints about the worker itself; `draining` reports whether it is about to end."""

    async def alive(_: Request) -> Response:
        return Response(200, b'{"status":"ok"}')

    async def ready(_: Request) -> Response:
        if draining():
            return Response(503, encode({"ready": False, "error": "this worker is about to end", "do": "ask another"}))
        missing, refused, degraded = host.missing(), host.refused(), host.degraded()
        document: dict[str, object] = {"ready": not missing}
        document |= {part: part not in missing for part in ("version", "program", "histories")}
        if refused is not None:
            document["refused"] = responses.RefusedVersion(*refused)
        if degraded:
            document["degraded"] = degraded
        if missing:
            reasons = "; ".join(f"{part}: {reason}" for part, reason in missing.items())
            document |= {"error": f"not ready: {reasons}", "do": "wait, or look at the applier's log"}
        return Response(503 if missing else 200, encode(document))

    async def metrics(request: Request) -> Response:
        body, media_type = rendered(registry, header(request.scope, b"accept") or "")
        return Response(200, body, [(b"content-type", media_type.encode())])

    return [
        Endpoint(
            "healthz",
            METHODS,
            "/healthz",
            alive,
            "Whether the process runs.",
            role=OPEN,
            returns=(responses.Alive,),
            failures=FAILED,
        ),
        Endpoint(
            "readyz",
            METHODS,
            "/readyz",
            ready,
            "Whether this worker can answer, and otherwise why not.",
            role=OPEN,
            returns=(responses.Readiness,),
            failures={**FAILED, 503: responses.Readiness},
        ),
        Endpoint(
            "metrics",
            METHODS,
            "/metrics",
            metrics,
            "Prometheus's text format; OpenMetrics for clients that accept it.",
            role=OPERATE,
            media_type=PLAIN,
            failures=FAILED,
        ),
    ]
