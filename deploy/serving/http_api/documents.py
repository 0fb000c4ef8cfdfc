"""What the interface says of itself: its OpenAPI document, and the same as a page to read, which needs no internet.

GET  /openapi.json /docs
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import Any

from deploy.serving.edge.tokens import OPEN
from deploy.serving.http_api import openapi
from deploy.serving.http_api.endpoints import FAILED, METHODS, Endpoint, Headers, Request, Response, encode
from deploy.serving.http_api.page import HTML, POLICY, page

_PAGE: Headers = [
    (b"content-type", HTML.encode()),
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
]


class Documents:
    """The endpoints that speak of the interface.

    Args:
        others: All other endpoints.
    """

    def __init__(self, others: Sequence[Endpoint]) -> None:
        self._others = others
        self._made: tuple[bytes, bytes] | None = None

    def endpoints(self) -> list[Endpoint]:
        """What is offered."""
        return [
            Endpoint(
                "openapi",
                METHODS,
                openapi.PATH,
                self._document,
                "This document.",
                returns=(dict[str, Any],),
                failures=FAILED,
                role=OPEN,
            ),
            Endpoint(
                "docs",
                METHODS,
                "/docs",
                self._page,
                "This document as a page to read.",
                media_type=HTML,
                failures=FAILED,
                role=OPEN,
            ),
        ]

    async def _document(self, _: Request) -> Response:
        return Response(200, self._both()[0])

    async def _page(self, _: Request) -> Response:
        return Response(200, self._both()[1], _PAGE)

    def _both(self) -> tuple[bytes, bytes]:
        """Made when they are first asked for."""
        if self._made is None:
            said = openapi.document([*self._others, *self.endpoints()], release())
            self._made = encode(said), page(said).encode()
        return self._made


def release() -> str:
    """The release of this program."""
    try:
        return metadata.version("springtide")
    except metadata.PackageNotFoundError:
        return "0"
