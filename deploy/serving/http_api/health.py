"""Whether a worker runs and can answer, and its metrics.

GET  /healthz /readyz /metrics
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry

from deploy.serving.edge.tokens import OPEN, OPERATE
from deploy.serving.exposition import told
from deploy.serving.host import Host
from deploy.serving.http_api.endpoints import FAILED, METHODS, Endpoint, Request, Response, encode, header
from springtide_client.answers import Alive, Readiness

_PLAIN = "text/plain; version=0.0.4; charset=utf-8"


class Health:
    """The endpoints that speak of the worker.

    Args:
        host: What answers.
        told_metrics: What /metrics says.
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
