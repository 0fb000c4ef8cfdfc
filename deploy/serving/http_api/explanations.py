"""Explanations over HTTP.

GET /v1/profiles/{user_id}/explain?label=|item=&category=&at=&context.NAME=&top=
"""

from __future__ import annotations

from deploy.serving.explaining.explaining import explain
from deploy.serving.host import Host
from deploy.serving.http_api.endpoints import Endpoint, Request, Response, encode
from deploy.serving.http_api.requests import ExplanationParameters, explained
from deploy.serving.line import Line, QueueLimits
from deploy.serving.recommending.turns import in_turns
from springtide_client.answers import Explanation
from state.metrics import WorkerMetrics


class Explanations:
    """The endpoint that says why an answer is what it is.

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
