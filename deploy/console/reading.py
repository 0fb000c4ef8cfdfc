"""What the console shows: the loop now and over time, versions, history, masks, one user's profile with why.

GET /api/session /api/state /api/series?after_ms= /api/versions?last= /api/history?last= /api/masks
GET /api/profiles/{user_id}?label=
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import msgspec

from deploy.console.commands import give
from deploy.console.guarding import RequestGuard
from deploy.console.lately_read import LatelyRead
from deploy.console.watching import LoopWatch
from deploy.serving.edge.tokens import OPEN
from deploy.serving.http_api.endpoints import METHODS, Endpoint, Request, Response, encode
from deploy.watch import scrape
from deploy.watch.address import serving_address
from state.config.settings import Settings
from state.errors import NotReady

KEEP_S = {"versions": 3.0, "history": 1.0, "masks": 1.0}
"""How long a list that was read counts as new."""
ANSWER_S = 10.0
FIELDS = "features,attributes"
INTERESTS = "12"


class SeriesParameters(msgspec.Struct, forbid_unknown_fields=True):
    """Of the curves: those behind a moment, ms since 1970."""

    after_ms: int = 0


class ListParameters(msgspec.Struct, forbid_unknown_fields=True):
    """Of a list: how many of the newest."""

    last: Annotated[int, msgspec.Meta(ge=1, le=500)] = 40


class ProfileLookup(msgspec.Struct, forbid_unknown_fields=True):
    """Of a profile: the category that is explained; its first where none is named."""

    label: str = ""


class Reading:
    """The endpoints that read.

    Args:
        settings: Of the system.
        watch: Knows the loop.
        guard: Knows roles.
        lately: Lists read lately.
        stores: Held while a store is open.
        now_ms: Wall clock.
    """

    def __init__(
        self,
        settings: Settings,
        watch: LoopWatch,
        guard: RequestGuard,
        lately: LatelyRead,
        stores: threading.Lock,
        now_ms: Callable[[], int],
    ) -> None:
        self._settings, self._watch, self._guard = settings, watch, guard
        self._lately, self._stores, self._now_ms = lately, stores, now_ms

    def endpoints(self) -> list[Endpoint]:
        """What is offered."""
        lists = [
            Endpoint(name, METHODS, f"/api/{name}", self._list, parameters=ListParameters)
            for name in ("versions", "history")
        ]
        return [
            Endpoint("session", METHODS, "/api/session", self._session, role=OPEN),
            Endpoint("state", METHODS, "/api/state", self._state),
            Endpoint("series", METHODS, "/api/series", self._series, parameters=SeriesParameters),
            *lists,
            Endpoint("masks", METHODS, "/api/masks", self._list),
            Endpoint("profile", METHODS, "/api/profiles/{user_id}", self._profile, parameters=ProfileLookup),
        ]

    async def _session(self, request: Request) -> Response:
        """Whether reading needs a token, and what the one that was sent may do."""
        role = self._guard.role(request.scope)
        return Response(200, encode({"open_to_read": self._guard.open_to_read, "role": role}))

    async def _state(self, request: Request) -> Response:
        return Response(200, encode(await asyncio.to_thread(self._watch.state)))

    async def _series(self, request: Request) -> Response:
        return Response(200, encode(self._watch.curves.document(request.parameters(SeriesParameters).after_ms)))

    async def _list(self, request: Request) -> Response:
        name = request.endpoint.name
        words = [name]
        if name != "masks":
            words.append(f"--last={request.parameters(ListParameters).last}")
        return Response(200, encode(await asyncio.to_thread(self._listed, words)))

    def _listed(self, words: Sequence[str]) -> Any:
        def read() -> Any:
            with self._stores:
                return give(self._settings, words, self._now_ms())

        return self._lately.of(tuple(words), KEEP_S[words[0]], read)

    async def _profile(self, request: Request) -> Response:
        """As serving answers; the user's id is passed on and kept nowhere."""
        user_id, label = request.path["user_id"], request.parameters(ProfileLookup).label
        return await asyncio.to_thread(self._looked_up, quote(user_id, safe=""), label)

    def _looked_up(self, user: str, label: str) -> Response:
        status, body = self._served(f"/v1/profiles/{user}?{urlencode({'fields': FIELDS, 'top': INTERESTS})}")
        if status != 200:
            return Response(status, body.encode())
        profile, explanation = json.loads(body), None
        label = label or next((one["label"] for one in profile["interests"]), "")
        if label:
            status, body = self._served(f"/v1/profiles/{user}/explain?{urlencode({'label': label, 'top': INTERESTS})}")
            explanation = json.loads(body)
        return Response(200, encode({"profile": profile, "explanation": explanation}))

    def _served(self, path: str) -> tuple[int, str]:
        status, body = scrape.fetch(serving_address(self._settings, path), ANSWER_S)
        if not status:
            raise NotReady(f"serving does not answer: {body}", "look at its log, or at `springtide status`")
        return status, body
