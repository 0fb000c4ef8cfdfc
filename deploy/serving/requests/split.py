"""Splits traffic during a rollout: sends a share of the users to the trial's workers, and records the exposures.

1. Read the user of the query; a keyed hash of the user decides the arm (`state/experiments/exposure.py`).
2. For the arm `trial`, forward the query unchanged to the workers at `rollout.address`.
3. If they do not answer, this worker answers, and the exposure records the failure.
4. The answer names its arm in the header `springtide-arm`, and the exposure is stored.

In a batch, each row has its own arm. The trial's workers answer their rows while this worker answers the others.
Batches have no latency comparison, because the parts differ in size.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import httpx
import msgspec

from deploy.serving.exposures import ExposureSpool
from deploy.serving.requests.http import Receive, Request, Response, header
from deploy.serving.requests.parameters import MOST_PROFILES
from state import layout
from state.config.settings import Settings
from state.errors import BadRequest, RegistryError, SpringtideError
from state.events.identity import Salt, user_id
from state.experiments.experiment import Experiment, Experiments
from state.experiments.exposure import ARMS, LIVE, TRIAL, Arm, Exposure, arm_of, encode, position_of
from state.process.said_once import SaidOnce

ROUTES = frozenset(("profile", "explain", "rank", "recommendations", "similar"))
"""The endpoints that answer about one user."""
MANY = "batch"
"""The endpoint that answers about several users."""
POLL_S = 0.25
MOST_IDLE = 64
"""Maximum of idle connections to the trial; each query in flight uses one."""
_PASSED_ON = (b"authorization", b"content-type", b"accept")
_log = logging.getLogger(__name__)


class Split:
    """Splits the queries of one worker. Used in its event loop."""

    def __init__(
        self,
        settings: Settings,
        salt: Salt,
        now_ms: Callable[[], int],
        clock_s: Callable[[], float] = time.perf_counter,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._salt, self._now_ms, self._clock_s = salt, now_ms, clock_s
        self._experiments = Experiments(settings)
        self._spool = ExposureSpool(settings.serving_dir / layout.EXPOSURES, now_ms, _log.warning)
        self._http = httpx.AsyncClient(
            base_url=settings.rollout.address,
            timeout=settings.rollout.timeout_s,
            limits=httpx.Limits(max_keepalive_connections=MOST_IDLE),
            transport=transport,
            trust_env=False,
        )
        self._rolled_out: Experiment | None = None
        self._polled_s = float("-inf")
        self._say = SaidOnce(_log.warning)

    async def answer(self, request: Request) -> Response:
        """Answers a request with its user's arm, or the endpoint if no rollout is open; raises what the endpoint
        raises.
        """
        experiment = self._split()
        if experiment is None or request.endpoint.name not in (*ROUTES, MANY):
            return await request.endpoint.answer(request)
        at_ms, began_s = self._now_ms(), self._clock_s()
        body = b"" if request.scope["method"] == "GET" else await request.body()
        request = request._replace(receive=_whole(body))
        if request.endpoint.name == MANY:
            batch = QuestionBatch.read(body)
            if batch is None or not 1 <= len(batch.users) <= MOST_PROFILES:
                # The endpoint reports the error.
                return await request.endpoint.answer(request)
            return await self._many(request, batch, experiment, at_ms)
        user = request.path.get("user_id") or _user_in(body)
        if user is None:
            return await request.endpoint.answer(request)
        # 1.
        exposure = self._exposure(experiment, user, at_ms)
        # 2. 3.
        forwarded = await self._forwarded(request, body) if exposure.arm == TRIAL else None
        failed = exposure.arm == TRIAL and forwarded is None
        try:
            response = forwarded or await request.endpoint.answer(request)
        except SpringtideError as error:
            if error.http_status >= 500:
                self._store([exposure], failed=ARMS, took_us=self._took_us(began_s))
            raise
        # 4. A refused query is not an exposure.
        if response.status < 400:
            self._store([exposure], failed=(TRIAL,) if failed else (), took_us=self._took_us(began_s))
        return response._replace(headers=[*response.headers, (b"springtide-arm", exposure.arm.encode())])

    async def _many(self, request: Request, batch: QuestionBatch, experiment: Experiment, at_ms: int) -> Response:
        """Answers a batch, each row with its user's arm."""
        # 1.
        exposures = [self._exposure(experiment, user, at_ms) for user in batch.users]
        places = {arm: [place for place, one in enumerate(exposures) if one.arm == arm] for arm in ARMS}
        try:
            # 2.
            theirs, ours = await asyncio.gather(
                self._theirs(request, batch, places[TRIAL]), _ours(request, batch, places[LIVE])
            )
            # 3.
            failed = theirs is None
            rows = [*(await _ours(request, batch, places[TRIAL]) if theirs is None else theirs), *ours]
        except BadRequest:
            # The error names a position in a part of the batch; the whole batch gives the right position.
            return await request.endpoint.answer(request)
        except SpringtideError as error:
            if error.http_status >= 500:
                self._store(exposures, failed=ARMS)
            raise
        # 4.
        self._store(exposures, failed=(TRIAL,) if failed else ())
        by_place = dict(zip([*places[TRIAL], *places[LIVE]], rows, strict=True))
        return Response(200, joined((one.arm, by_place[place]) for place, one in enumerate(exposures)))

    async def _theirs(self, request: Request, batch: QuestionBatch, places: Sequence[int]) -> list[bytes] | None:
        """Returns the rows from the trial's workers; None if they do not answer, or fail."""
        if not places:
            return []
        given = await self._forwarded(request, batch.part(places))
        rows = None if given is None or given.status != 200 else rows_of(given.body)
        return rows if rows is not None and len(rows) == len(places) else None

    def _exposure(self, experiment: Experiment, user: str, at_ms: int) -> Exposure:
        """Builds a user's exposure with what is known before the answer."""
        assert experiment.rollout is not None
        pseudonym, share = user_id(self._salt, user), experiment.share
        arm = arm_of(position_of(self._salt, experiment.name, pseudonym), share)
        return Exposure(f"{pseudonym:016x}", experiment.name, experiment.rollout.step, share, arm, at_ms, None)

    def _store(self, exposures: Sequence[Exposure], failed: Sequence[Arm], took_us: int | None = None) -> None:
        """Stores exposures; those of the arms `failed` are marked as failed."""
        done = (msgspec.structs.replace(one, took_us=took_us, failed=one.arm in failed) for one in exposures)
        self._spool.write(b"\n".join(map(encode, done)))

    def _took_us(self, began_s: float) -> int:
        return round(1e6 * (self._clock_s() - began_s))

    def close(self) -> None:
        """Closes the file of exposures."""
        self._spool.close()

    def _split(self) -> Experiment | None:
        """Returns the experiment with an open rollout, at most `POLL_S` old; the last known one if it cannot be read."""
        now_s = self._clock_s()
        if now_s - self._polled_s >= POLL_S:
            self._polled_s = now_s
            try:
                self._rolled_out = self._experiments.document().rolled_out
                self._say.clear()
            except RegistryError as error:
                self._say(f"experiments cannot be read: {error}; users keep their arms")
        return self._rolled_out if self._rolled_out is not None and self._rolled_out.is_split else None

    async def _forwarded(self, request: Request, body: bytes) -> Response | None:
        """Forwards a request to the trial's workers; returns None if they do not answer, or fail."""
        query, path = request.query_string, request.scope["raw_path"].decode("latin-1")
        headers = {one.decode(): value for one in _PASSED_ON if (value := header(request.scope, one)) is not None}
        try:
            given = await self._http.request(
                request.scope["method"],
                path + ("?" + query.decode("latin-1") if query else ""),
                content=body,
                headers=headers,
            )
        except httpx.HTTPError as error:
            self._say(f"the trial does not answer ({type(error).__name__}): {error}")
            return None
        if given.status_code in (401, 403, 429) or given.status_code >= 500:
            self._say(f"the trial answers {given.status_code}")
            return None
        kind = given.headers.get("content-type", "application/json")
        return Response(given.status_code, given.content, [(b"content-type", kind.encode())])


class _Asker(msgspec.Struct):
    user_id: str | int


class _Answered(msgspec.Struct):
    profiles: list[msgspec.Raw]


class QuestionBatch(msgspec.Struct, frozen=True):
    """A batch of queries, as the client sent it, in raw JSON but for the user ids.

    `name` is the field with the queries, `profiles` (objects with `user_id`) or `users` (ids); `rest` has the other
    fields.
    """

    name: str
    questions: Sequence[msgspec.Raw]
    users: Sequence[str]
    rest: Mapping[str, msgspec.Raw]

    @classmethod
    def read(cls, body: bytes) -> QuestionBatch | None:
        """Parses a request's body; returns None if it is not a valid batch, and then the endpoint reports the error.

        >>> QuestionBatch.read(b'{"profiles": [{"user_id": 7, "item": "i1"}]}').users, QuestionBatch.read(b"{}")
        (['7'], None)
        """
        try:
            rest = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
            (name,) = rest.keys() & {"profiles", "users"}
            questions = msgspec.json.decode(rest.pop(name), type=list[msgspec.Raw])
            if name == "users":
                users = [str(msgspec.json.decode(one, type=str | int)) for one in questions]
            else:
                users = [str(msgspec.json.decode(one, type=_Asker).user_id) for one in questions]
        except (msgspec.MsgspecError, UnicodeDecodeError, ValueError):
            return None
        return cls(name, questions, users, rest)

    def part(self, places: Iterable[int]) -> bytes:
        """Encodes the body of a batch with only the queries at `places`.

        >>> QuestionBatch.read(b'{"users": ["ann", 7, "bob"], "top": 3}').part([0, 1])
        b'{"top":3,"users":["ann",7]}'
        """
        return msgspec.json.encode({**self.rest, self.name: [self.questions[place] for place in places]})


def rows_of(body: bytes) -> list[bytes] | None:
    """Returns the rows of an answer as raw JSON; None if it is not an answer to a batch.

    >>> rows_of(b'{"profiles":[{"a":1},{"a":2}]}'), rows_of(b"{}")
    ([b'{"a":1}', b'{"a":2}'], None)
    """
    try:
        return [bytes(row) for row in msgspec.json.decode(body, type=_Answered).profiles]
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def joined(answers: Iterable[tuple[Arm, bytes]]) -> bytes:
    """Builds the answer to a batch; each row names its arm.

    >>> joined([("live", b'{"a":1}'), ("trial", b'{"a":2}')])
    b'{"profiles":[{"a":1,"arm":"live"},{"a":2,"arm":"trial"}]}'
    """
    return b'{"profiles":[' + b",".join(b'%s,"arm":"%s"}' % (row[:-1], arm.encode()) for arm, row in answers) + b"]}"


async def _ours(request: Request, batch: QuestionBatch, places: Sequence[int]) -> list[bytes]:
    if not places:
        return []
    given = await request.endpoint.answer(request._replace(receive=_whole(batch.part(places))))
    rows = rows_of(given.body)
    assert rows is not None, "the endpoint answers with a row a question"
    return rows


def _user_in(body: bytes) -> str | None:
    """Returns the raw user id of a body; None without a valid one, and then the endpoint reports the error."""
    try:
        return str(msgspec.json.decode(body, type=_Asker).user_id)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _whole(body: bytes) -> Receive:

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive
