"""Segments over HTTP.

GET /v1/segments
GET /v1/segments/{segment}?from=&n=
GET /v1/segments/{segment}/users/{user_id}
GET /v1/segments/{segment}/lookalikes?n=
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

from deploy.serving.host import Host
from deploy.serving.http_api.endpoints import FAILED, Endpoint, Request, Response, encode
from deploy.serving.segments import SegmentLookalikes, SegmentPage, SegmentSizes, UserSegment
from springtide_client.answers import Failure
from state.segments.configured import NAME

MEMBERS = 100
MOST_MEMBERS = 1000
_NAMED: Mapping[str, Mapping[str, str]] = {"segment": {"pattern": f"^{NAME.pattern}$"}}


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
    """The endpoints that say who is in a segment.

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
