"""Answers a share of the users by the trial's workers while a rollout is open, and notes who was answered by which arm.

1. The user of the question, whose place decides the arm (`state/rollouts/assignment.py`).
2. Of the arm `trial`, the question goes to the workers at `rollout.address` as it came.
3. Where they do not answer, this worker does: nobody goes without an answer for a trial. The exposure says that they failed.
4. The answer says its arm, in the header `springtide-arm`, and the exposure is kept.

Of a batch each row has its own arm: the trial's workers are asked for theirs while this worker answers the others. No
latency is compared by it, for the parts are of different sizes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import msgspec

from deploy.serving.http_api.endpoints import Receive, Request, Response, header
from deploy.serving.http_api.requests import MOST_PROFILES
from deploy.serving.splitting import batches
from deploy.serving.splitting.batches import Asker, QuestionBatch
from deploy.serving.splitting.spool import ExposureSpool
from state import layout
from state.config.settings import Settings
from state.errors import BadRequest, RegistryError, SpringtideError
from state.events.identity import Salt, user_id
from state.process.said_once import SaidOnce
from state.rollouts.assignment import ARMS, LIVE, TRIAL, Arm, arm_of, place_of
from state.rollouts.exposure import Exposure, encode
from state.rollouts.rollout import Rollout
from state.rollouts.rollouts import Rollouts

ROUTES = frozenset(("profile", "explain", "rank", "recommendations", "similar"))
"""Those that answer one user."""

MANY = "batch"
"""The one that answers several."""

LOOK_S = 0.25

MOST_IDLE = 64
"""Connections to the trial that are kept; there are as many as questions under way."""

_PASSED_ON = (b"authorization", b"content-type", b"accept")
_log = logging.getLogger(__name__)


class Split:
    """Splits the questions of one worker; used in its event loop.

    Args:
        settings: Of the whole system.
        salt: Of the pseudonyms.
        now_ms: The wall clock.
        clock_s: A monotonic clock.
        transport: What carries questions to the trial; by default httpx's own.
    """

    def __init__(
        self,
        settings: Settings,
        salt: Salt,
        now_ms: Callable[[], int],
        clock_s: Callable[[], float] = time.perf_counter,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._salt, self._now_ms, self._clock_s = salt, now_ms, clock_s
        self._rollouts = Rollouts(settings.registry_dir)
        self._spool = ExposureSpool(settings.serving_dir / layout.EXPOSURES, now_ms, _log.warning)
        self._http = httpx.AsyncClient(
            base_url=settings.rollout.address,
            timeout=settings.rollout.timeout_s,
            limits=httpx.Limits(max_keepalive_connections=MOST_IDLE),
            transport=transport,
            trust_env=False,
        )
        self._rollout: Rollout | None = None
        self._look_s = float("-inf")
        self._say = SaidOnce(_log.warning)

    async def answer(self, request: Request) -> Response:
        """Answers a request, whichever arm its user is in; as the endpoint does where no rollout is open.

        Raises:
            SpringtideError: Of the endpoint.
        """
        rollout = self._open_rollout()
        if rollout is None or request.endpoint.name not in (*ROUTES, MANY):
            return await request.endpoint.answer(request)
        at_ms, began_s = self._now_ms(), self._clock_s()
        body = b"" if request.scope["method"] == "GET" else await request.body()
        request = request._replace(receive=_whole(body))
        if request.endpoint.name == MANY:
            batch = batches.read(body)
            if batch is None or not 1 <= len(batch.users) <= MOST_PROFILES:
                # The endpoint says what is wrong.
                return await request.endpoint.answer(request)
            return await self._many(request, batch, rollout, at_ms)
        user = _asker(request, body)
        if user is None:
            return await request.endpoint.answer(request)
        # 1.
        noted = self._exposure(rollout, user, at_ms)
        # 2. 3.
        found = await self._forwarded(request, body) if noted.arm == TRIAL else None
        failed = noted.arm == TRIAL and found is None
        try:
            response = found or await request.endpoint.answer(request)
        except SpringtideError as error:
            if error.http_status >= 500:
                self._note([noted], failed=ARMS, took_us=self._took_us(began_s))
            raise
        # 4. A question that is refused exposes nobody to anything.
        if response.status < 400:
            self._note([noted], failed=(TRIAL,) if failed else (), took_us=self._took_us(began_s))
        return response._replace(headers=[*response.headers, (b"springtide-arm", noted.arm.encode())])

    async def _many(self, request: Request, batch: QuestionBatch, rollout: Rollout, at_ms: int) -> Response:
        """Answers a batch, each row by its user's arm."""
        # 1.
        noted = [self._exposure(rollout, user, at_ms) for user in batch.users]
        places = {arm: [place for place, one in enumerate(noted) if one.arm == arm] for arm in ARMS}
        try:
            # 2.
            theirs, ours = await asyncio.gather(
                self._theirs(request, batch, places[TRIAL]), _ours(request, batch, places[LIVE])
            )
            # 3.
            failed = theirs is None
            rows = [*(await _ours(request, batch, places[TRIAL]) if theirs is None else theirs), *ours]
        except BadRequest:
            # It names a place in a part; in the whole batch that is another one.
            return await request.endpoint.answer(request)
        except SpringtideError as error:
            if error.http_status >= 500:
                self._note(noted, failed=ARMS)
            raise
        # 4.
        self._note(noted, failed=(TRIAL,) if failed else ())
        by_place = dict(zip([*places[TRIAL], *places[LIVE]], rows, strict=True))
        return Response(200, batches.joined((one.arm, by_place[place]) for place, one in enumerate(noted)))

    async def _theirs(self, request: Request, batch: QuestionBatch, places: Sequence[int]) -> list[bytes] | None:
        """The rows of the trial's workers; None where they do not answer, or fail."""
        if not places:
            return []
        given = await self._forwarded(request, batch.part(places))
        rows = None if given is None or given.status != 200 else batches.rows(given.body)
        return rows if rows is not None and len(rows) == len(places) else None

    def _exposure(self, rollout: Rollout, user: str, at_ms: int) -> Exposure:
        """Of a user who asks, what can be said before the answer."""
        pseudonym = user_id(self._salt, user)
        arm = arm_of(place_of(self._salt, rollout.name, pseudonym), rollout.share)
        return Exposure(f"{pseudonym:016x}", rollout.name, rollout.step, rollout.share, arm, at_ms, None)

    def _note(self, noted: Sequence[Exposure], failed: Sequence[Arm], took_us: int | None = None) -> None:
        """Keeps exposures; those of the arms `failed` say that they failed."""
        told = (msgspec.structs.replace(one, took_us=took_us, failed=one.arm in failed) for one in noted)
        self._spool.write(b"\n".join(map(encode, told)))

    def _took_us(self, began_s: float) -> int:
        return round(1e6 * (self._clock_s() - began_s))

    def close(self) -> None:
        """Ends the file of exposures."""
        self._spool.close()

    def _open_rollout(self) -> Rollout | None:
        """The rollout that is open, as of a quarter of a second ago at most; where it cannot be read, the one of before."""
        now_s = self._clock_s()
        if now_s - self._look_s >= LOOK_S:
            self._look_s = now_s
            try:
                self._rollout = self._rollouts.newest()
            except RegistryError as error:
                self._say(f"rollouts cannot be read: {error}; users are told apart as before")
        return self._rollout if self._rollout is not None and self._rollout.is_open else None

    async def _forwarded(self, request: Request, body: bytes) -> Response | None:
        """What the trial's workers answer; None where they do not, or fail."""
        query, path = request.query_string, request.scope["raw_path"].decode("latin-1")
        named = {one.decode(): value for one in _PASSED_ON if (value := header(request.scope, one)) is not None}
        try:
            given = await self._http.request(
                request.scope["method"],
                path + ("?" + query.decode("latin-1") if query else ""),
                content=body,
                headers=named,
            )
        except httpx.HTTPError as error:
            self._say(f"the trial does not answer ({type(error).__name__}): {error}")
            return None
        if given.status_code in (401, 403, 429) or given.status_code >= 500:
            self._say(f"the trial answers {given.status_code}")
            return None
        kind = given.headers.get("content-type", "application/json")
        return Response(given.status_code, given.content, [(b"content-type", kind.encode())])


async def _ours(request: Request, batch: QuestionBatch, places: Sequence[int]) -> list[bytes]:
    """The rows that this worker answers.

    Raises:
        SpringtideError: Of the endpoint.
    """
    if not places:
        return []
    given = await request.endpoint.answer(request._replace(receive=_whole(batch.part(places))))
    rows = batches.rows(given.body)
    assert rows is not None, "the endpoint answers with a row a question"
    return rows


def _asker(request: Request, body: bytes) -> str | None:
    """The raw id of the user whom a question is about; None where it names none."""
    if (user := request.path.get("user_id")) is not None:
        return user
    try:
        return str(msgspec.json.decode(body, type=Asker).user_id)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        # The endpoint says what is wrong.
        return None


def _whole(body: bytes) -> Receive:
    """Gives a body that was read already once more."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive
