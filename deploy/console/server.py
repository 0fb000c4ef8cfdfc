"""Serves the operator's console over HTTP: `springtide console`; `springtide up` starts it too.

`docs/operate/console.md` lists the requests. Access control uses tokens and origins, not cookies. No request path is
logged, because a path may contain a user id.

It collects what it shows: an hour of figures for its curves and a day of problems, in memory.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import msgspec
from prometheus_client import CollectorRegistry

from deploy import sections, status
from deploy.console.steering import CommandRunner, Steering, status_of
from deploy.serving.requests.access import OPEN, OPERATE, READ, Access, Tokens, are_wanted, make_missing
from deploy.serving.requests.http import (
    LAST,
    METHODS,
    Endpoint,
    Headers,
    Receive,
    Request,
    Response,
    Routes,
    Scope,
    Send,
    answer,
    encode,
    failure,
    header,
)
from deploy.serving.requests.server import ConnectionLimits, DrainingServer, listen
from deploy.serving.requests.worker_metrics import rendered
from deploy.watch import scrape
from deploy.watch.figures import Figures, Spread
from deploy.watch.scrape import address, serving_address
from deploy.watch.snapshot import Poller, Problem, Snapshot
from state.config.settings import Settings
from state.errors import BadRequest, Forbidden, NotReady, SettingsError, SpringtideError, WorkerFailed
from state.metrics import ConsoleMetrics, add_process
from state.process.environment import wall_ms
from state.process.log_lines import SaidOnce
from state.process.part import run_part

EVERY_S = 5.0
KEEP_S = 3600.0

CURVES = (
    "events_per_s",
    "microbatches_per_s",
    "rows_per_s",
    "steps_per_s",
    "answers_per_s",
    "failed_per_s",
    "dead_per_s",
    "lag_events",
    "trainer_lag",
    "serving_lag",
    "features_s",
    "weights_s",
    "log_loss",
    "auc",
    "top1",
    "version",
    "newest_version",
)
"""The figures with a curve; each is a field of `Figures`."""
QUANTILES: Mapping[str, tuple[str, str]] = {
    "answer_p50_s": ("answer", "p50"),
    "answer_p99_s": ("answer", "p99"),
    "step_p50_s": ("step", "p50"),
}
"""Curve -> the histogram and its quantile."""
LIFT = "lift_top1"
"""Curve of the model's top-1 hit rate compared with the best simple baseline."""
DAY_MS, MOST_PROBLEMS = 86_400_000, 200
ENDED_MS = 60_000
"""A problem that was not seen for this long has ended; if it returns, it is another one."""
STARTS = "a-process-starts"
"""Section of the runbook for processes that start: no problem of the past."""
WATCHED_S = 20.0
"""How long after a request the console counts as open."""
POLL_S = 1.0
SECTIONS_S = 15.0
AWAY_S = 5.0
"""Interval of reads while Kafka is unreachable."""
_log = logging.getLogger(__name__)


class Curves:
    """The newest points, at least `every_s` apart. One thread adds, others read."""

    def __init__(self, every_s: float = EVERY_S, keep_s: float = KEEP_S) -> None:
        self._every_ms = round(every_s * 1000)
        self._points: deque[tuple[int, tuple[float | None, ...]]] = deque(maxlen=int(keep_s / every_s))

    def add(self, at_ms: int, figures: Figures, lift: float | None = None) -> bool:
        """Adds a point if one is due, and returns whether it did. `lift` is the model's, about 0 to 1."""
        if self._points and 0 <= at_ms - self._points[-1][0] < self._every_ms:
            return False
        values = [_rounded(getattr(figures, name)) for name in CURVES]
        for spread, quantile in QUANTILES.values():
            values.append(_rounded(getattr(figures.spreads.get(spread, Spread()), quantile)))
        self._points.append((at_ms, (*values, _rounded(lift))))
        return True

    def document(self, after_ms: int = 0) -> dict[str, Any]:
        """Returns the points after a moment as JSON values: `at_ms`, and as many values of each curve.

        >>> kept = Curves(1.0)
        >>> kept.add(1000, Figures(lag_events=7.0)), kept.add(1200, Figures()), kept.add(2000, Figures())
        (True, False, True)
        >>> kept.document(1500)["at_ms"], kept.document()["curves"]["lag_events"]
        ([2000], [7.0, None])
        """
        points = [point for point in list(self._points) if point[0] > after_ms]
        names = (*CURVES, *QUANTILES, LIFT)
        return {
            "at_ms": [at_ms for at_ms, _ in points],
            "curves": {name: [values[place] for _, values in points] for place, name in enumerate(names)},
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


@dataclass
class PastProblem:
    """A problem from when it was first seen until it was last seen, ms since 1970, with its newest text."""

    problem: Problem
    first_ms: int
    last_ms: int


class PastProblems:
    """The problems of the last day, at most `MOST_PROBLEMS`. One thread adds, others read."""

    def __init__(self, since_ms: int) -> None:
        self._since_ms = since_ms
        self._problems: list[PastProblem] = []

    def add(self, at_ms: int, problems: Sequence[Problem]) -> None:
        """Adds what is wrong at a moment; the same section and stage is the same problem, whatever its figures."""
        kept = [past for past in self._problems if past.last_ms >= at_ms - DAY_MS]
        open_ones = {
            (past.problem.section, past.problem.stage): past for past in kept if past.last_ms >= at_ms - ENDED_MS
        }
        for problem in problems:
            past = open_ones.get((problem.section, problem.stage))
            if past is None:
                past = open_ones[problem.section, problem.stage] = PastProblem(problem, at_ms, at_ms)
                kept.append(past)
            past.problem, past.last_ms = problem, at_ms
        self._problems = kept[-MOST_PROBLEMS:]

    def document(self, now_ms: int) -> dict[str, Any]:
        """Returns the problems as JSON values, the oldest first; `open` is whether one has not ended.

        >>> past = PastProblems(0)
        >>> past.add(1000, [Problem("warning", "7% dead letters", "dead-letters", "clicks")])
        >>> past.add(9000, [Problem("warning", "9% dead letters", "dead-letters", "clicks")])
        >>> (found,) = past.document(10_000)["problems"]
        >>> found["text"], found["first_ms"], found["last_ms"], found["open"], past.document(99_000)["problems"][0]["open"]
        ('9% dead letters', 1000, 9000, True, False)
        """
        return {
            "since_ms": max(self._since_ms, now_ms - DAY_MS),
            "problems": [
                past.problem.to_json()
                | {"first_ms": past.first_ms, "last_ms": past.last_ms, "open": past.last_ms >= now_ms - ENDED_MS}
                for past in list(self._problems)
            ],
        }


class LoopWatch:
    """Polls the loop in its own threads; `stores` is held while a store is open."""

    def __init__(self, settings: Settings, stores: threading.Lock, now_ms: Callable[[], int]) -> None:
        self._settings, self._stores, self._now_ms = settings, stores, now_ms
        self._poller, self.curves = Poller(settings, now_ms=now_ms), Curves()
        self._past = PastProblems(now_ms())
        self._requested_s = self._sections_s = float("-inf")
        self._sections: dict[str, Any] | None = None
        self._snapshot: Snapshot | None = None
        self._wanted, self._stopping = threading.Event(), threading.Event()
        self._log_once = SaidOnce(_log.error)
        self._polling, self._reading = threading.Lock(), threading.Lock()

    def start(self) -> None:
        """Starts polling."""
        threading.Thread(target=self._run, name="watch", daemon=True).start()
        threading.Thread(target=self._run_sections, name="sections", daemon=True).start()

    def stop(self) -> None:
        """Stops polling."""
        self._stopping.set()
        self._wanted.set()

    def poll(self) -> Snapshot:
        """Polls the processes' metrics once."""
        with self._polling:
            snapshot = self._poller.poll()
            compared = sections.quality(snapshot.scrapes["trainer"])
            self.curves.add(snapshot.at_ms, snapshot.figures, None if compared is None else compared["lift"]["top1"])
            self._snapshot = snapshot
            is_fresh = self._sections is not None and time.monotonic() - self._sections_s < 2 * SECTIONS_S
            whole = snapshot.having(self._sections or {}) if is_fresh else snapshot
            self._past.add(snapshot.at_ms, [problem for problem in whole.faults if problem.section != STARTS])
            return snapshot

    def past_problems(self) -> dict[str, Any]:
        """Returns the problems of the last day, or since the start if that is later."""
        return self._past.document(self._now_ms())

    def changed(self) -> None:
        """Makes the sections be read again soon, after a change by an operator."""
        self._sections_s = float("-inf")

    def read_sections(self) -> dict[str, Any]:
        """Reads the sections once."""
        with self._reading:
            with self._stores:
                self._sections = sections.read(self._settings, self._now_ms())
            self._sections_s = time.monotonic()
            return self._sections

    def state(self) -> dict[str, Any]:
        """Returns the document of `springtide status -o json`, with the time of the poll and the age of the sections."""
        self._requested_s = time.monotonic()
        self._wanted.set()
        snapshot = self._snapshot or self.poll()
        snapshot = snapshot.having(self._sections or self.read_sections())
        return status.document(self._settings, snapshot) | {
            "at_ms": snapshot.at_ms,
            "sections_age_s": round(time.monotonic() - self._sections_s, 1),
        }

    def _is_open(self) -> bool:
        return time.monotonic() - self._requested_s < WATCHED_S

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._attempt(self.poll)
            if self._is_open():
                self._stopping.wait(POLL_S)
            else:
                self._wanted.clear()
                self._wanted.wait(EVERY_S)

    def _run_sections(self) -> None:
        while not self._stopping.wait(POLL_S):
            every_s = SECTIONS_S if self._sections is None or self._sections["kafka"]["answers"] else AWAY_S
            if self._is_open() and time.monotonic() - self._sections_s >= every_s:
                self._attempt(self.read_sections)

    def _attempt(self, work: Callable[[], object]) -> None:
        """Runs `work`; a failure is logged once, the last figures stay, and the next call tries again."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - the edge of the thread
            self._log_once(f"the loop could not be polled: {type(error).__name__}: {error}")


READING = ("GET", "HEAD")
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Content security policy: the page may load its own files, and nothing inline."""
SECURITY_HEADERS: Headers = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
ANSWER_S = 10.0
FIELDS = "features,attributes"
INTERESTS = "12"
STATIC = Path(__file__).with_name("static")
KINDS = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}
MOST_BODY_BYTES = 16 << 10
NO_STORE = (b"cache-control", b"no-store")
CONNECTIONS = 256
DRAIN_S = 0.0


class RequestGuard:
    """Authorizes requests, or refuses them with a reason. `open_to_read`: every client may read."""

    def __init__(self, tokens: Tokens, open_to_read: bool) -> None:
        self._tokens, self.open_to_read = tokens, open_to_read

    def require(self, scope: Scope, endpoint: Endpoint) -> None:
        """Authorizes one request.

        Raises:
            Unauthorized: A token is required, and the request has none or an unknown one.
            Forbidden: The token is of another role, or the request comes from another page.
            BadRequest: It changes something and is no JSON.
        """
        if scope["method"] not in READING:
            _require_own_page(scope)
        if endpoint.role != READ or not self.open_to_read:
            self._tokens.require(header(scope, b"authorization"), endpoint.role)

    def role(self, scope: Scope) -> str:
        """Returns the role of a request's token: `operate`, `read`, or nothing."""
        for role in (OPERATE, READ):
            try:
                self._tokens.require(header(scope, b"authorization"), role)
                return role
            except BadRequest:
                continue
        return ""


def open_to_read(settings: Settings) -> bool:
    """Whether reading needs no token, neither here nor at the serving API that the console queries.

    >>> open_to_read(Settings())
    True
    """
    return not are_wanted(settings) and not are_wanted(settings, settings.console.host)


def _require_own_page(scope: Scope) -> None:
    origin, site = header(scope, b"origin"), header(scope, b"sec-fetch-site")
    foreign = origin is not None and origin.partition("://")[2] != header(scope, b"host")
    if foreign or site not in (None, "same-origin", "none"):
        raise Forbidden("the request comes from another page", "ask from the console's own page")
    if (header(scope, b"content-type") or "").partition(";")[0].strip().lower() != "application/json":
        raise BadRequest("the body is not declared as JSON", "send content-type: application/json")


class SeriesParameters(msgspec.Struct, forbid_unknown_fields=True):
    """Parameters of the curves: the points after a moment, ms since 1970."""

    after_ms: int = 0


class ListParameters(msgspec.Struct, forbid_unknown_fields=True):
    """Parameters of a list: how many of the newest."""

    last: Annotated[int, msgspec.Meta(ge=1, le=500)] = 40


class JumpsParameters(msgspec.Struct, forbid_unknown_fields=True):
    """Parameters of the jumps: the last minutes, which are compared with the time before."""

    minutes: Annotated[int, msgspec.Meta(ge=1, le=1440)] = 5


class ProfileLookup(msgspec.Struct, forbid_unknown_fields=True):
    """Parameters of a profile: the category to explain; the first one if none is named."""

    label: str = ""


class Reading:
    """The endpoints that read."""

    def __init__(self, watch: LoopWatch, guard: RequestGuard, commands: CommandRunner) -> None:
        self._watch, self._guard, self._commands = watch, guard, commands

    def endpoints(self) -> list[Endpoint]:
        """Returns the endpoints."""
        lists = [
            Endpoint(name, METHODS, f"/api/{name}", self._list, parameters=ListParameters)
            for name in ("versions", "history")
        ]
        return [
            Endpoint("session", METHODS, "/api/session", self._session, role=OPEN),
            Endpoint("state", METHODS, "/api/state", self._state),
            Endpoint("series", METHODS, "/api/series", self._series, parameters=SeriesParameters),
            Endpoint("problems", METHODS, "/api/problems", self._problems),
            *lists,
            Endpoint("masks", METHODS, "/api/masks", self._list),
            Endpoint("jumps", METHODS, "/api/jumps", self._list, parameters=JumpsParameters, role=OPERATE),
            Endpoint("profile", METHODS, "/api/profiles/{user_id}", self._profile, parameters=ProfileLookup),
        ]

    async def _session(self, request: Request) -> Response:
        role = self._guard.role(request.scope)
        return Response(200, encode({"open_to_read": self._guard.open_to_read, "role": role}))

    async def _state(self, request: Request) -> Response:
        return Response(200, encode(await asyncio.to_thread(self._watch.state)))

    async def _series(self, request: Request) -> Response:
        return Response(200, encode(self._watch.curves.document(request.parameters(SeriesParameters).after_ms)))

    async def _problems(self, request: Request) -> Response:
        return Response(200, encode(self._watch.past_problems()))

    async def _list(self, request: Request) -> Response:
        name = request.endpoint.name
        words = [name]
        if name == "jumps":
            words.append(f"--minutes={request.parameters(JumpsParameters).minutes}")
        elif name != "masks":
            words.append(f"--last={request.parameters(ListParameters).last}")
        return Response(200, encode(await asyncio.to_thread(self._commands.listed, words)))

    async def _profile(self, request: Request) -> Response:
        """Returns serving's answer; the user's id is passed on and stored nowhere."""
        user_id, label = request.path["user_id"], request.parameters(ProfileLookup).label
        return await asyncio.to_thread(self._looked_up, quote(user_id, safe=""), label)

    def _looked_up(self, user: str, label: str) -> Response:
        status, body = self._served(f"/v1/profiles/{user}?{urlencode({'fields': FIELDS, 'top': INTERESTS})}")
        if status != 200:
            return Response(status, body.encode())
        profile, explanation = json.loads(body), None
        label = label or next((interest["label"] for interest in profile["interests"]), "")
        if label:
            status, body = self._served(f"/v1/profiles/{user}/explain?{urlencode({'label': label, 'top': INTERESTS})}")
            explanation = json.loads(body)
        return Response(200, encode({"profile": profile, "explanation": explanation}))

    def _served(self, path: str) -> tuple[int, str]:
        status, body = scrape.fetch(serving_address(self._commands.settings, path), ANSWER_S)
        if not status:
            raise NotReady(f"serving does not answer: {body}", "look at its log, or at `springtide status`")
        return status, body


def endpoints(folder: Path = STATIC) -> list[Endpoint]:
    """Returns one endpoint for each static file; `index.html` is the page itself.

    >>> [one.path for one in endpoints()][0]
    '/'
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix in KINDS)
    files.sort(key=lambda path: path.name != "index.html")
    return [
        _endpoint("/" if path.name == "index.html" else f"/{path.relative_to(folder).as_posix()}", path)
        for path in files
    ]


def _endpoint(name: str, path: Path) -> Endpoint:
    content = path.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    # Browsers ask each time, and get the file only if it has changed.
    headers = [(b"content-type", KINDS[path.suffix]), (b"etag", tag.encode()), (b"cache-control", b"no-cache")]

    async def answer(request: Request) -> Response:
        if header(request.scope, b"if-none-match") == tag:
            return Response(304, b"", headers)
        return Response(200, b"" if request.scope["method"] == "HEAD" else content, headers)

    return Endpoint("page", METHODS, name, answer, role=OPEN)


class Console:
    """The ASGI application. The caller that runs it starts `watch`, which collects the loop's figures.

    With `draining` set, the process is about to end, and answers end their connections.
    """

    def __init__(self, settings: Settings, guard: RequestGuard, now_ms: Callable[[], int]) -> None:
        commands = CommandRunner(settings, now_ms)
        self.watch = LoopWatch(settings, commands.stores, now_ms)
        self.draining = False
        self.endpoints = [
            *Reading(self.watch, guard, commands).endpoints(),
            *Steering(commands, self.watch.changed).endpoints(),
            Endpoint("metrics", METHODS, "/metrics", self._show_metrics),
            *endpoints(),
        ]
        self._registry = CollectorRegistry()
        self._metrics = ConsoleMetrics(self._registry)
        add_process(self._registry)
        self._guard, self._routes = guard, Routes(self.endpoints)
        self._warn_once = SaidOnce(_log.warning)

    def count_refused(self, reason: str) -> None:
        """Logs the first refusal of each reason."""
        self._warn_once(f"a connection or request was refused: {reason}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        name = "unknown"
        try:
            endpoint, placeholders = self._routes.find(scope)
            name = endpoint.name
            self._guard.require(scope, endpoint)
            response = await endpoint.answer(Request(scope, receive, placeholders, endpoint, MOST_BODY_BYTES))
        except SpringtideError as error:
            response = failure(error)._replace(status=status_of(error))
        except Exception:  # noqa: BLE001 - the edge of the process: logged, others are answered
            _log.exception("a request for %s failed", name)
            response = failure(
                WorkerFailed("the console failed; its log has the cause", "report it with the console's log")
            )
        self._metrics.requests.labels(outcome(response.status)).inc()
        kept = any(header_name == b"cache-control" for header_name, _ in response.headers)
        headers = [
            *response.headers,
            *SECURITY_HEADERS,
            *(() if kept else (NO_STORE,)),
            *((LAST,) if self.draining else ()),
        ]
        body = b"" if scope["method"] == "HEAD" else response.body
        await answer(send, Response(response.status, body, headers))

    async def _show_metrics(self, request: Request) -> Response:
        body, media_type = rendered(self._registry, header(request.scope, b"accept") or "")
        return Response(200, body, [(b"content-type", media_type.encode())])


def outcome(status: int) -> str:
    """Returns the label of an HTTP status in metrics.

    >>> [outcome(status) for status in (200, 304, 403, 409, 503)]
    ['answered', 'answered', 'refused', 'refused', 'failed']
    """
    return "answered" if status < 400 else "refused" if status < 500 else "failed"


def access_of(settings: Settings) -> tuple[Access, RequestGuard]:
    """Returns the console's access control: serving's certificate and tokens, which are created if missing.

    Raises:
        SettingsError: The files that the settings name cannot be used.
    """
    make_missing(settings.tokens_dir)
    access = Access.of(settings, always=True)
    assert access.tokens is not None
    return access, RequestGuard(access.tokens, open_to_read(settings))


def run(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        PortTaken: The port is in use.
        SettingsError: There is no port, or files cannot be used.
    """
    port, host = settings.console.port, settings.console.host
    if not port:
        raise SettingsError("console.port is 0: the console has no port", "set console.port to a free port")
    access, guard = access_of(settings)
    bound = listen(host, port, "console.port")
    app = Console(settings, guard, wall_ms)
    serving = settings.serving
    limits = ConnectionLimits(serving.timeout_s, CONNECTIONS, own_hosts=guard.open_to_read)
    server = DrainingServer(app, limits, DRAIN_S, access=access)
    server.end_on_signals()
    app.watch.start()
    _log.info(
        "the page is %s, to steer with the token in %s", address(settings, host, port), settings.tokens_dir / OPERATE
    )
    try:
        server.run(sockets=[bound])
    finally:
        app.watch.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the console with the settings of `argv`; returns the exit code."""
    return run_part("console", run, argv, _log)


if __name__ == "__main__":
    sys.exit(main())
