"""Items for a user over HTTP.

POST /v1/rank      {"user_id": ..., "items": [...], "context": {...}, "at": ...}
GET  /v1/recommendations/{user_id}?n=&category=&exclude_seen=&at=&context.NAME=
GET  /v1/similar/{user_id}?n=&exclude_seen=&at=&context.NAME=
"""

from __future__ import annotations

from deploy.serving.host import Host
from deploy.serving.http_api.endpoints import ASKED, SENT, Endpoint, Request, Response, encode
from deploy.serving.http_api.item_requests import (
    RANK_EXAMPLE,
    NearParameters,
    RankQuestion,
    RecommendationParameters,
    near_question,
    rank_question,
    recommendation,
)
from deploy.serving.line import Line, QueueLimits
from deploy.serving.recommending.ranking import rank
from deploy.serving.recommending.recommending import recommend
from deploy.serving.recommending.similar import similar
from deploy.serving.recommending.turns import ItemTurns, in_turns
from springtide_client.answers import Failure, Ranking, Recommendations, SimilarItems
from state.metrics import WorkerMetrics


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
