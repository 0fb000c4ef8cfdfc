"""The endpoints of a worker: profiles, items, explanations and segments, over HTTP and gRPC, and its health.

`docs/reference/api.md` documents the API for callers. gRPC gives the same answers as HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar
from urllib.parse import quote, urlencode

import msgspec
import orjson
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
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


def profile_endpoints(answers: Answers) -> list[Endpoint]:
    """Returns the endpoints that answer profiles, explanations and items."""
    host = answers.host

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

    async def ranking(request: Request) -> Response:
        question: RankQuestion = await request.document()
        steps = rank(host.predictor(), question.query(), question.named_items(), host.impressions)
        return Response(200, encode(await answers.run(steps)))

    async def recommendations(user: str, parameters: RecommendationParameters) -> responses.Recommendations:
        sources = answers.sources()
        wanted = parameters.wanted()._replace(per_category=host.serving.per_category)
        return await answers.run(recommend(host.predictor(), sources, parameters.query(user), wanted, host.impressions))

    async def nearest(user: str, parameters: NearParameters) -> responses.SimilarItems:
        near = answers.sources().near
        query, wanted = parameters.query(user), parameters.wanted()
        return answers.counted(similar(host.predictor(), near, query, wanted, host.impressions))

    async def explanation(user: str, parameters: ExplanationParameters) -> responses.Explanation:
        return await answers.run(explain(host.predictor(), parameters.query(user), parameters.label))

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
            about_user(ExplanationParameters, explanation),
            "Explains a probability of a profile.",
            parameters=ExplanationParameters,
            returns=(responses.Explanation,),
        ),
        Endpoint(
            "rank",
            ("POST",),
            "/v1/rank",
            ranking,
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
            about_user(RecommendationParameters, recommendations),
            "Items for one user, each with its reason.",
            parameters=RecommendationParameters,
            returns=(responses.Recommendations,),
        ),
        Endpoint(
            "similar",
            ("GET",),
            "/v1/similar/{user_id}",
            about_user(NearParameters, nearest),
            "The items nearest to a user, by the vectors of both.",
            parameters=NearParameters,
            returns=(responses.SimilarItems,),
            failures={**ASKED, 501: responses.Failure},
        ),
    ]


METHODS_OF_PROFILES = {
    "GetProfile": ("profile", "Profile"),
    "BatchGetProfiles": ("batch", "BatchGetProfilesResponse"),
    "Rank": ("rank", "RankResponse"),
    "Recommend": ("recommendations", "RecommendResponse"),
    "Explain": ("explain", "Explanation"),
    "Similar": ("similar", "SimilarResponse"),
}
"""gRPC method -> the endpoint that answers it, and the message of its response."""


def profile_service(endpoints: Sequence[Endpoint], router: Router | None) -> Service:
    """Returns the gRPC service `springtide.v1.Profiles`: its endpoints answer, through `router` also those of other hosts."""
    by_name = {endpoint.name: endpoint for endpoint in endpoints}

    def method(name: str, endpoint: Endpoint, kind: str) -> Method:
        async def answer(request: Message, headers: Headers) -> Any:
            asked = _as_http(endpoint, _fields_of(request), headers)
            response = endpoint.answer(asked) if router is None else router.answer(asked, endpoint.answer)
            return _message_of(await response, kind)

        return Method(name, f"{PACKAGE}.{name}Request", answer)

    methods = [method(name, by_name[endpoint], kind) for name, (endpoint, kind) in METHODS_OF_PROFILES.items()]
    return Service(f"{PACKAGE}.Profiles", methods)


def _fields_of(request: Message) -> dict[str, Any]:
    """Converts a message to the names and values of HTTP; absent fields are left out, but for lists of messages.

    Raises:
        BadRequest: A field is not one of this release, like an unknown parameter of HTTP.
    """
    for unknown in UnknownFieldSet(request):
        problem = f"{request.DESCRIPTOR.name} has no field number {unknown.field_number}"
        raise BadRequest(problem, f"send the fields of this release's {PACKAGE}: {_names(request)}")
    fields: dict[str, Any] = {_name(field): [] for field in request.DESCRIPTOR.fields if _is_list_of_messages(field)}
    for field, value in request.ListFields():
        name = _name(field)
        if name == "at":
            fields[name] = str(value)
        elif name == "question":
            fields |= _fields_of(value)
        elif _is_list_of_messages(field):
            fields[name] = [_fields_of(element) for element in value]
        elif field.message_type is None:
            fields[name] = list(value) if field.is_repeated else value
        else:
            fields[name] = dict(value) if field.is_repeated else _fields_of(value)
    return fields


def _names(request: Message) -> str:
    return ", ".join(f"{field.name} = {field.number}" for field in request.DESCRIPTOR.fields)


def _name(field: FieldDescriptor) -> str:
    name: str = field.name
    return {"at_ms": "at", "questions": "profiles"}.get(name, name)


def _is_list_of_messages(field: FieldDescriptor) -> bool:
    kind = field.message_type
    return field.is_repeated and kind is not None and not kind.GetOptions().map_entry


def _as_http(endpoint: Endpoint, fields: dict[str, Any], headers: Headers) -> Request:
    """Returns the HTTP request of the same meaning; raises BadRequest if a path has no user."""
    user, query, body = "", "", b""
    if endpoint.body:
        body = msgspec.json.encode(fields)
    elif user := fields.pop("user_id", ""):
        context = {f"context.{name}": text for name, text in fields.pop("context", {}).items()}
        texts = {name: ",".join(value) if isinstance(value, list) else value for name, value in fields.items()}
        query = urlencode(texts | context)
    else:
        raise BadRequest("the request names no user_id", "name a user")
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
    document, make = orjson.loads(response.body), message(f"{PACKAGE}.{kind}")
    for profile in document.get("profiles", [document]):
        _drop_missing(profile)
    try:
        return make(**document)
    except ValueError:
        # Another host answered, and it runs a later release. This takes some hundred times as long.
        return json_format.ParseDict(document, make(), ignore_unknown_fields=True)


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
            "Whether this worker can answer, and otherwise why not; and what its answers get no updates of.",
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
