"""Whether a worker runs and can answer, and its metrics.

GET  /healthz /readyz /metrics
"""

from __future__ import annotations

from collections.abc import Callable

from deploy.serving.edge.tokens import OPEN, OPERATE
from deploy.serving.host import Host
from deploy.serving.http_api.endpoints import FAILED, METHODS, Endpoint, Headers, Request, Response, encode
from springtide_client.answers import Alive, Readiness

_PLAIN = "text/plain; version=0.0.4; charset=utf-8"
_TEXT: Headers = [(b"content-type", _PLAIN.encode())]


class Health:
    """The endpoints that speak of the worker.

    Args:
        host: What answers.
        exposition: Says the metrics.
        draining: Whether the worker is about to end.
    """

    def __init__(self, host: Host, exposition: Callable[[], bytes], draining: Callable[[], bool]) -> None:
        self._host, self._exposition, self._draining = host, exposition, draining

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
                *("metrics", METHODS, "/metrics", self._metrics, "Prometheus's text."),
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
        told = {} if refused is None else {"refused": {"version": refused[0], "reason": refused[1]}}
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

    async def _metrics(self, _: Request) -> Response:
        return Response(200, self._exposition(), _TEXT)
