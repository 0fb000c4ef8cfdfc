"""Routes requests to other workers: those of hosts that hold parts of the users, and those of a trial during a rollout.

**Hosts** (`serving.shares`). Each host keeps its entry in the routing table.

1. The user's share is the pseudonym modulo 64. If this host holds the share and is ready, it answers.
2. Else the request is forwarded to a live host of the share (`state/registry/hosts.py`). If that host fails, another one
   is tried. A header marks the request, so that no host forwards it again.
3. A batch is divided by host, and its rows are joined in their order.

**Rollout.** A share of the users is answered by the trial's workers, and exposures are recorded.

1. Read the user of the query; a keyed hash of the user decides the arm (`state/experiments/evidence.py`).
2. For the arm `trial`, forward the query unchanged to the workers at `rollout.address`.
3. If they do not answer, this worker answers, and the exposure records the failure.
4. The answer names its arm in the header `springtide-arm`, and the exposure is stored.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec

from deploy.serving.answers.host import Host
from deploy.serving.host_files import ExposureSpool, name_of
from deploy.serving.requests.access import trusting
from deploy.serving.requests.http import JSON, Headers, Receive, Request, Response, header
from deploy.serving.requests.parameters import MOST_PROFILES
from state import layout
from state.config.settings import Settings
from state.disk import documents
from state.disk.files import HOST
from state.errors import BadRequest, NotHeld, NotReady, RegistryError, SpringtideError
from state.events.identity import Salt, pseudonyms, user_id
from state.experiments.evidence import ARMS, LIVE, TRIAL, Arm, Exposure, arm_of, encode_exposure, position_of
from state.experiments.experiment import Experiment, Experiments
from state.metrics import WorkerMetrics
from state.process.log_lines import SaidOnce
from state.registry import hosts
from state.registry.hosts import GONE_S, RENEW_S, HostEntry, RoutingTable
from state.user_shares import SHARES, UserShares

ROUTES = frozenset(("profile", "explain", "rank", "recommendations", "similar"))
"""The endpoints that answer about one user."""
MANY = "batch"
"""The endpoint that answers about several users."""
MOST_IDLE = 64
"""Maximum of idle connections; each query in flight uses one."""
_PASSED_ON = (b"authorization", b"content-type", b"accept")
_PASSED_BACK = ("content-type", "retry-after", "springtide-arm")

Answer = Callable[[Request], Awaitable[Response]]
"""Answers a request on this host."""


class Forwarder:
    """Sends requests to other workers over connections that it keeps. Used by one event loop.

    Args:
        verify: Whether to verify certificates, or the context to verify them with.
    """

    def __init__(
        self, timeout_s: float, verify: ssl.SSLContext | bool = True, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        limits = httpx.Limits(max_keepalive_connections=MOST_IDLE)
        self._http = httpx.AsyncClient(
            timeout=timeout_s, limits=limits, verify=verify, transport=transport, trust_env=False
        )

    async def send(
        self,
        address: str,
        request: Request,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Response:
        """Sends a request with the given body, and more headers, to the workers at `address`.

        Raises:
            httpx.HTTPError: They do not answer, within `timeout_s` if that is given.
        """
        query, path = request.query_string, request.scope["raw_path"].decode("latin-1")
        passed = {name.decode(): value for name in _PASSED_ON if (value := header(request.scope, name)) is not None}
        answer = await self._http.request(
            request.scope["method"],
            address + path + ("?" + query.decode("latin-1") if query else ""),
            content=body,
            headers={**passed, **(headers or {})},
            timeout=self._http.timeout if timeout_s is None else timeout_s,
        )
        back: Headers = [
            (name.encode(), value.encode()) for name in _PASSED_BACK if (value := answer.headers.get(name))
        ]
        return Response(answer.status_code, answer.content, JSON if back == JSON else back)


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
            members = documents.decode(body, dict[str, msgspec.Raw])
            (name,) = members.keys() & {"profiles", "users"}
            questions = documents.decode(members.pop(name), list[msgspec.Raw])
            if name == "users":
                users = [str(documents.decode(question, str | int)) for question in questions]
            else:
                users = [str(documents.decode(question, _Asker).user_id) for question in questions]
        except (msgspec.MsgspecError, UnicodeDecodeError, ValueError):
            return None
        return cls(name, questions, users, members)

    def part(self, indices: Iterable[int]) -> bytes:
        """Encodes the body of a batch with only the queries at `indices`.

        >>> QuestionBatch.read(b'{"users": ["ann", 7, "bob"], "top": 3}').part([0, 1])
        b'{"top":3,"users":["ann",7]}'
        """
        return msgspec.json.encode({**self.rest, self.name: [self.questions[index] for index in indices]})


def rows_of(response: Response | None, count: int) -> list[bytes] | None:
    """Returns the rows of an answer as raw JSON; None if it is not an answer to a batch of `count` queries.

    >>> rows_of(Response(200, b'{"profiles":[{"a":1},{"a":2}]}'), 2), rows_of(Response(200, b"{}"), 2)
    ([b'{"a":1}', b'{"a":2}'], None)
    """
    if response is None or response.status != 200:
        return None
    try:
        rows = [bytes(row) for row in documents.decode(response.body, _Answered).profiles]
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return rows if len(rows) == count else None


async def answered_here(request: Request, batch: QuestionBatch, indices: Sequence[int], answer: Answer) -> list[bytes]:
    """Returns the rows of a part of a batch that this host answers; raises what `answer` raises."""
    if not indices:
        return []
    rows = rows_of(await answer(request._replace(receive=whole(batch.part(indices)))), len(indices))
    assert rows is not None, "the endpoint answers with one row for each query"
    return rows


def user_in(body: bytes) -> str | None:
    """Returns the raw user id of a body; None without a valid one, and then the endpoint reports the error."""
    try:
        return str(documents.decode(body, _Asker).user_id)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def whole(body: bytes) -> Receive:
    """Returns the ASGI function that receives this body."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


EXPERIMENTS_POLL_S = 0.25
PATIENCE = 10  # the experiment has this part of `serving.timeout_s` to answer; then the live version answers
_log = logging.getLogger(__name__)


class Split:
    """Splits the queries of one worker. Used in its event loop."""

    def __init__(self, settings: Settings, salt: Salt, now_ms: Callable[[], int]) -> None:
        self._salt, self._now_ms = salt, now_ms
        self._experiments = Experiments(settings)
        self._spool = ExposureSpool(settings.serving_dir / layout.EXPOSURES, now_ms, _log.warning)
        self._address = settings.rollout.address
        self._forwarder = Forwarder(settings.serving.timeout_s / PATIENCE)
        self._rolled_out: Experiment | None = None
        self._polled_s = float("-inf")
        self._warn_once = SaidOnce(_log.warning)

    async def answer(self, request: Request) -> Response:
        """Answers a request with its user's arm, or the endpoint if no rollout is open; raises what the endpoint
        raises.
        """
        experiment = self._open_rollout()
        if experiment is None or request.endpoint.name not in (*ROUTES, MANY):
            return await request.endpoint.answer(request)
        at_ms, began_s = self._now_ms(), time.perf_counter()
        body = b"" if request.scope["method"] == "GET" else await request.body()
        request = request._replace(receive=whole(body))
        if request.endpoint.name == MANY:
            batch = QuestionBatch.read(body)
            if batch is None or not 1 <= len(batch.users) <= MOST_PROFILES:
                # The endpoint reports the error.
                return await request.endpoint.answer(request)
            return await self._answer_batch(request, batch, experiment, at_ms)
        user = request.path.get("user_id") or user_in(body)
        if user is None:
            return await request.endpoint.answer(request)
        # 1.
        exposure = self._exposure(experiment, user, at_ms)
        # 2. 3.
        forwarded = await self._ask_trial(request, body) if exposure.arm == TRIAL else None
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

    async def _answer_batch(
        self, request: Request, batch: QuestionBatch, experiment: Experiment, at_ms: int
    ) -> Response:
        """Answers a batch, each row with its user's arm."""
        # 1.
        exposures = [self._exposure(experiment, user, at_ms) for user in batch.users]
        indices = {arm: [index for index, exposure in enumerate(exposures) if exposure.arm == arm] for arm in ARMS}
        try:
            # 2.
            answer = request.endpoint.answer
            trial, live = await asyncio.gather(
                self._trial_rows(request, batch, indices[TRIAL]), answered_here(request, batch, indices[LIVE], answer)
            )
            # 3.
            failed = trial is None
            rows = [*(await answered_here(request, batch, indices[TRIAL], answer) if trial is None else trial), *live]
        except BadRequest:
            # The error names a position in a part of the batch; the whole batch gives the right position.
            return await request.endpoint.answer(request)
        except SpringtideError as error:
            if error.http_status >= 500:
                self._store(exposures, failed=ARMS)
            raise
        # 4.
        self._store(exposures, failed=(TRIAL,) if failed else ())
        row_of = dict(zip([*indices[TRIAL], *indices[LIVE]], rows, strict=True))
        return Response(200, joined((exposure.arm, row_of[index]) for index, exposure in enumerate(exposures)))

    async def _trial_rows(self, request: Request, batch: QuestionBatch, indices: Sequence[int]) -> list[bytes] | None:
        """Returns the rows from the trial's workers; None if they do not answer, or fail."""
        if not indices:
            return []
        return rows_of(await self._ask_trial(request, batch.part(indices)), len(indices))

    def _exposure(self, experiment: Experiment, user: str, at_ms: int) -> Exposure:
        """Builds a user's exposure with what is known before the answer."""
        assert experiment.rollout is not None
        pseudonym, share = user_id(self._salt, user), experiment.share
        arm = arm_of(position_of(self._salt, experiment.name, pseudonym), share)
        return Exposure(f"{pseudonym:016x}", experiment.name, experiment.rollout.step, share, arm, at_ms, None)

    def _store(self, exposures: Sequence[Exposure], failed: Sequence[Arm], took_us: int | None = None) -> None:
        """Stores exposures; those of the arms `failed` are marked as failed."""
        stored = (
            msgspec.structs.replace(exposure, took_us=took_us, failed=exposure.arm in failed) for exposure in exposures
        )
        self._spool.write(b"\n".join(map(encode_exposure, stored)))

    def _took_us(self, began_s: float) -> int:
        return round(1e6 * (time.perf_counter() - began_s))

    def close(self) -> None:
        """Closes the file of exposures."""
        self._spool.close()

    def _open_rollout(self) -> Experiment | None:
        """Returns the experiment with an open rollout, at most `EXPERIMENTS_POLL_S` old; the last known one if it cannot be read."""
        now_s = time.perf_counter()
        if now_s - self._polled_s >= EXPERIMENTS_POLL_S:
            self._polled_s = now_s
            try:
                self._rolled_out = self._experiments.document().rolled_out
                self._warn_once.clear()
            except RegistryError as error:
                self._warn_once(f"experiments cannot be read: {error}; users keep their arms")
        return self._rolled_out if self._rolled_out is not None and self._rolled_out.is_split else None

    async def _ask_trial(self, request: Request, body: bytes) -> Response | None:
        """Forwards a request to the trial's workers; returns None if they do not answer, or fail."""
        try:
            response = await self._forwarder.send(self._address, request, body)
        except httpx.HTTPError as error:
            self._warn_once(f"the trial does not answer ({type(error).__name__}): {error}")
            return None
        if response.status in (401, 403, 429) or response.status >= 500:
            self._warn_once(f"the trial answers {response.status}")
            return None
        return response


def joined(answers: Iterable[tuple[Arm, bytes]]) -> bytes:
    """Builds the answer to a batch; each row names its arm.

    >>> joined([("live", b'{"a":1}'), ("trial", b'{"a":2}')])
    b'{"profiles":[{"a":1,"arm":"live"},{"a":2,"arm":"trial"}]}'
    """
    return b'{"profiles":[' + b",".join(b'%s,"arm":"%s"}' % (row[:-1], arm.encode()) for arm, row in answers) + b"]}"


FORWARDED, SHARE = b"springtide-forwarded", b"springtide-share"
"""Headers: the host that forwarded a request; and in a response, the shares of its users, if the request has it too."""
TABLE_POLL_S = 1.0
FIRST_S = 2.0
"""How long a host may take to answer while another one can be tried."""
AVOIDED_S = 5.0
"""How long a host that did not answer is tried last."""
MOST_TRIED = 3
FAILED = frozenset((429, 502, 503, 504))
"""HTTP status codes after which another host is tried."""
_ANY = ("0.0.0.0", "::", "")


def address_of(settings: Settings) -> str:
    """Returns the URL under which other hosts reach this one.

    >>> address_of(Settings())
    'http://127.0.0.1:8501'
    """
    serving = settings.serving
    if serving.advertise:
        return serving.advertise
    name = HOST if serving.host in _ANY else f"[{serving.host}]" if ":" in serving.host else serving.host
    return f"{'https' if serving.tls_cert else 'http'}://{name}:{serving.port}"


@dataclass
class _PendingBatch:
    """A batch that is being answered; `rows` are the rows so far, by their index in the batch."""

    request: Request
    batch: QuestionBatch
    shares: Sequence[int]
    local: Answer
    rows: dict[int, bytes] = field(default_factory=dict)


class Router:
    """Routes the requests of one worker. Used in its event loop.

    Attributes:
        held: The shares that this host answers itself; none while it is not ready.
        table: The routing table of the last poll.
    """

    def __init__(
        self,
        settings: Settings,
        salt: Salt,
        host: Host,
        metrics: WorkerMetrics,
        now_ms: Callable[[], int],
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        serving = settings.serving
        self._registry, self._host, self._now_ms = settings.registry_dir, host, now_ms
        self._entry = HostEntry(name_of(settings.serving_dir), address_of(settings), str(host.shares), 0)
        self._pseudonym, self._forward_counts, self._unheld = pseudonyms(salt), metrics.forwarded, metrics.unheld_shares
        self._first_s = min(FIRST_S, serving.timeout_s)
        # Hosts share a certificate; without one they trust the system's.
        verify = trusting(serving.tls_cert) if serving.tls_cert else True
        self._forwarder = Forwarder(serving.timeout_s, verify, transport)
        self.held, self.table = UserShares(0), RoutingTable()
        self._avoid_until_ms: dict[str, float] = {}
        self._renewed_ms, self._leaving = 0, False
        self._task: asyncio.Task[None] | None = None
        self._warn_once = SaidOnce(_log.warning)
        if not host.shares.is_all:
            host.require = self.require

    # The table

    def start(self) -> None:
        """Keeps this host in the table from now on, and follows the table."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    def leave(self) -> None:
        """Withdraws this host's entry permanently; requests that still arrive are answered."""
        self._leaving = True
        try:
            hosts.withdraw(self._registry, self._entry.name)
        except OSError as error:
            self._warn_once(f"this host's entry cannot be removed from {self._registry}: {error}")

    async def _run(self) -> None:
        while True:
            await self.poll()
            await asyncio.sleep(TABLE_POLL_S)

    async def poll(self) -> None:
        """Renews or withdraws this host's entry as the host is ready or not, and reads the table."""
        ready = not self._leaving and not self._host.missing()
        try:
            entries = await asyncio.to_thread(self._sync_table, ready)
            self._warn_once.clear()
        except OSError as error:
            self._warn_once(f"the routing table in {self._registry} cannot be used: {error}; the last one stays in use")
            return
        finally:
            # A host that drains answers its users to the end.
            self.held = self._host.shares if ready or self._leaving else UserShares(0)
            if self._leaving:
                self.leave()
        self.table = RoutingTable.of(entries, self._now_ms())
        self._unheld.set(len([*self.table.held_by(0)]))

    def _sync_table(self, ready: bool) -> list[HostEntry]:
        now_ms = self._now_ms()
        if not ready and self._renewed_ms:
            # Only its own entry: another worker of this host may be ready.
            hosts.withdraw(self._registry, self._entry.name)
            self._renewed_ms = 0
        elif ready and not 0 <= now_ms - self._renewed_ms < RENEW_S * 1000:
            entry = self._entry
            hosts.renew(self._registry, HostEntry(entry.name, entry.address, entry.shares, now_ms))
            self._renewed_ms = now_ms
        entries = hosts.entries(self._registry)
        for entry in entries:
            if now_ms - entry.at_ms > GONE_S * 1000:
                hosts.withdraw(self._registry, entry.name)
        return entries

    # Answers

    def require(self, user: int) -> None:
        """Raises NotHeld, which names the hosts to ask, if this host does not hold a user, by pseudonym."""
        if user not in self._host.shares:
            share = user % SHARES
            addresses = " or ".join(host.address for host in self._candidates(share)) or "a host that holds it"
            raise NotHeld(f"the user is of share {share}, and this host holds {self._host.shares}", f"ask {addresses}")

    def is_here(self, request: Request) -> bool:
        """Whether this host answers a request about the user in its path, without anything about routing."""
        user = request.path.get("user_id")
        return user is not None and self.is_held(user) and header(request.scope, SHARE) is None

    def is_held(self, user: str) -> bool:
        """Whether this host answers about a user now."""
        return self.held.is_all or self._pseudonym(user) in self.held

    async def answer(self, request: Request, local: Answer) -> Response:
        """Answers a request with `local`, or through other hosts.

        Raises:
            NotHeld: No live host holds a user; or another host forwarded the request, and this host does not hold the user.
            NotReady: Another host forwarded the request, and this host is not ready.
            SpringtideError: As `local`.
        """
        name = request.endpoint.name
        if name not in ROUTES and name != MANY:
            return await local(request)
        body = b"" if request.scope["method"] == "GET" else await request.body()
        request = request._replace(receive=whole(body))
        if name == MANY:
            # The whole batch is checked first: an error in a part would name another position.
            users = [query.user for query in (await request.document()).queries()]
        else:
            user = request.path.get("user_id") or user_in(body)
            users = [] if user is None else [user]
        shares = [self._pseudonym(user) % SHARES for user in users]
        if all(share in self.held for share in shares):
            response = await local(request)
        elif header(request.scope, FORWARDED) is not None:
            for share in shares:
                self.require(share)
            raise NotReady("this host is not ready for the users that it holds", "ask another host of the share")
        elif name == MANY:
            response = await self._answer_batch(request, body, shares, local)
        else:
            response = await self._answer_one(request, body, shares[0], local)
        if header(request.scope, SHARE) is None or response.status != 200:
            return response
        return response._replace(headers=[*response.headers, (SHARE, ",".join(map(str, shares)).encode())])

    async def _answer_one(self, request: Request, body: bytes, share: int, local: Answer) -> Response:
        refused, candidates = None, self._candidates(share)
        for number, host in enumerate(candidates):
            response = await self._forward(host, request, body, is_last=number + 1 == len(candidates))
            if response is not None and response.status not in FAILED:
                self._forward_counts.labels("answered").inc()
                return response
            refused = response or refused
        if share in self._host.shares:
            return await local(request)
        if refused is None:
            raise self._no_host(share)
        self._forward_counts.labels("failed").inc()
        return refused

    async def _answer_batch(self, request: Request, body: bytes, shares: Sequence[int], local: Answer) -> Response:
        batch = QuestionBatch.read(body)
        assert batch is not None, "the endpoint accepts it"
        pending = _PendingBatch(request, batch, shares, local)
        indices = range(len(shares))
        held = [index for index in indices if shares[index] in self.held]
        others = [index for index in indices if shares[index] not in self.held]
        _, refused = await asyncio.gather(
            self._add_local_rows(pending, held), self._add_rows(pending, others, frozenset(), None)
        )
        if refused is not None:
            self._forward_counts.labels("failed").inc()
            return refused
        self._forward_counts.labels("answered").inc()
        return Response(200, b'{"profiles":[' + b",".join(pending.rows[index] for index in indices) + b"]}")

    async def _add_local_rows(self, pending: _PendingBatch, indices: Sequence[int]) -> None:
        rows = await answered_here(pending.request, pending.batch, indices, pending.local)
        pending.rows.update(zip(indices, rows, strict=True))

    async def _add_rows(
        self, pending: _PendingBatch, indices: Sequence[int], tried: frozenset[str], refused: Response | None
    ) -> Response | None:
        """Adds the rows at `indices` from hosts other than those `tried`; returns the response of a host that refuses."""
        candidates_of = {share: self._candidates(share) for share in {pending.shares[index] for index in indices}}
        # One order for all shares, so that as few hosts as possible are asked.
        hosts_in_order = sorted({host for candidates in candidates_of.values() for host in candidates}, key=self._rank)
        indices_by_host = dict[HostEntry, list[int]]()
        local = list[int]()
        for index in indices:
            share = pending.shares[index]
            untried = [host for host in candidates_of[share] if host.name not in tried]
            if untried and len(tried) < MOST_TRIED:
                indices_by_host.setdefault(min(untried, key=hosts_in_order.index), []).append(index)
            elif share in self._host.shares:
                local.append(index)
            elif refused is not None:
                return refused
            else:
                raise self._no_host(share)
        await self._add_local_rows(pending, local)
        refusals = await asyncio.gather(
            *(self._add_rows_from(host, pending, part, tried) for host, part in indices_by_host.items())
        )
        return next(filter(None, refusals), None)

    async def _add_rows_from(
        self, host: HostEntry, pending: _PendingBatch, indices: Sequence[int], tried: frozenset[str]
    ) -> Response | None:
        holders = {holder.name for index in indices for holder in self.table.holders[pending.shares[index]]}
        is_last = not holders - tried - {host.name, self._entry.name}
        response = await self._forward(host, pending.request, pending.batch.part(indices), is_last)
        rows = rows_of(response, len(indices))
        if rows is not None:
            pending.rows.update(zip(indices, rows, strict=True))
            return None
        if response is not None and response.status != 200 and response.status not in FAILED:
            return response
        return await self._add_rows(pending, indices, tried | {host.name}, response)

    def _candidates(self, share: int) -> list[HostEntry]:
        """Returns the other live hosts of a share, at most `MOST_TRIED`, those that did not answer lately last."""
        others = [host for host in self.table.holders[share] if host.name != self._entry.name]
        return sorted(others, key=self._rank)[:MOST_TRIED]

    def _rank(self, host: HostEntry) -> tuple[bool, float]:
        return self._now_ms() < self._avoid_until_ms.get(host.name, 0.0), random.random()

    async def _forward(self, host: HostEntry, request: Request, body: bytes, is_last: bool) -> Response | None:
        """Forwards a request; returns None if the host does not answer."""
        headers, timeout_s = {FORWARDED.decode(): self._entry.name}, None if is_last else self._first_s
        try:
            return await self._forwarder.send(host.address, request, body, headers, timeout_s)
        except httpx.HTTPError as error:
            self._avoid_until_ms[host.name] = self._now_ms() + AVOIDED_S * 1000
            self._warn_once(f"{host.address} does not answer ({type(error).__name__}): {error}")
            return None

    def _no_host(self, share: int) -> NotHeld:
        """Counts a request of whose share no host answers, and returns the error."""
        self._forward_counts.labels("failed").inc()
        addresses = ", ".join(host.address for host in self._candidates(share))
        do = "start a host that holds it; `springtide status` shows all"
        if not addresses:
            return NotHeld(f"no live host holds share {share} of the users", do)
        return NotHeld(f"no host that holds share {share} of the users answers: {addresses}", do)
