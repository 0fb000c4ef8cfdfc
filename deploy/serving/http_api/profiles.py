"""Profiles over HTTP.

GET  /v1/profiles/{user_id}?item=&category=&at=&context.NAME=&fields=&top=
POST /v1/profiles:batch      {"profiles": [{"user_id": ..., "item": ..., ...}, ...]} or {"users": [...]}, "fields", "top"
"""

from __future__ import annotations

import asyncio

from deploy.serving.host import Host
from deploy.serving.http_api.endpoints import SENT, Endpoint, Request, Response, encode
from deploy.serving.http_api.requests import BATCH, EXAMPLE, ProfileParameters, question, questions
from deploy.serving.line import QueueLimits
from deploy.serving.profile_batches import profile_batches
from springtide_client.answers import Profile
from springtide_client.answers import Profiles as ProfilesAnswer
from state.metrics import WorkerMetrics

_NOTHING_GIVEN = ProfileParameters()


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
