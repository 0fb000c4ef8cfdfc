"""Routes requests between hosts that hold parts of the users (`serving.shares`), and keeps this host in the routing table.

1. The user's share is the pseudonym modulo 64. If this host holds the share and is ready, it answers.
2. Else the request is forwarded to a live host of the share (`state/registry/hosts.py`). If that host fails, another one
   is tried. A header marks the request, so that no host forwards it again.
3. A batch is divided by host, and its rows are joined in their order.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx

from deploy.serving.answers.host import Host
from deploy.serving.host_files import name_of
from deploy.serving.requests.forwarding import (
    MANY,
    ROUTES,
    Answer,
    Forwarder,
    QuestionBatch,
    answered_here,
    rows_of,
    user_in,
    whole,
)
from deploy.serving.requests.http import Request, Response, header
from state.config.settings import Settings
from state.disk.files import HOST
from state.errors import NotHeld, NotReady
from state.events.identity import Salt, pseudonyms
from state.metrics import WorkerMetrics
from state.process.log_lines import SaidOnce
from state.registry import hosts
from state.registry.hosts import GONE_S, RENEW_S, HostEntry, RoutingTable
from state.user_shares import SHARES, UserShares

FORWARDED, SHARE = b"springtide-forwarded", b"springtide-share"
"""Headers: the host that forwarded a request; and in a response, the shares of its users, if the request has it too."""
POLL_S = 1.0
FIRST_S = 2.0
"""How long a host may take to answer while another one can be tried."""
AVOIDED_S = 5.0
"""How long a host that did not answer is tried last."""
MOST_TRIED = 3
FAILED = frozenset((429, 502, 503, 504))
"""HTTP status codes after which another host is tried."""
_ANY = ("0.0.0.0", "::", "")
_log = logging.getLogger(__name__)


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


def verification(certificate: str) -> ssl.SSLContext | bool:
    """Returns what hosts trust of each other: the certificate that they share, with any name; else the system's."""
    if not certificate:
        return True
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


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
        self._forwarder = Forwarder(serving.timeout_s, verification(serving.tls_cert), transport)
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
            await asyncio.sleep(POLL_S)

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
