"""Receives Alertmanager notifications over HTTP and pins serving to the last good version: `springtide webhook`.

A firing alert pins serving to the newest version from before the alert. It never changes what an operator decided, and
a resolved alert changes nothing. The format is version 4 of Alertmanager's webhook JSON:
https://prometheus.io/docs/alerting/latest/configuration/#webhook_config
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated, Literal

import msgspec

from deploy.formats import iso
from deploy.operate.branch import ServingBranch, described
from deploy.operate.control import current
from deploy.operate.versions import open_registry
from deploy.serving.requests.access import OPERATE, Access, Tokens, make_missing
from deploy.serving.requests.http import (
    LAST,
    Endpoint,
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
from state.config.settings import Settings
from state.errors import BadRequest, SpringtideError, UnknownVersion
from state.process.environment import wall_ms
from state.process.part import run_part
from state.registry import control as transitions
from state.registry.registry import Registry

EXAMPLE = "what Alertmanager's webhook sends, in version 4"
BEFORE_MS = 60_000  # the version must be older than the alert by this much: the problem began before its alert
MOST_TEXT = 300
ACTOR = "alertmanager"
PATH = "/v1/alerts"
MOST_BYTES = 1 << 20
TIMEOUT_S = 10.0
CONNECTIONS = 64
_log = logging.getLogger(__name__)


class Labels(msgspec.Struct, frozen=True):
    """Labels of an alert. Its name goes into the audit log, so it must not contain a line break."""

    alertname: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_:-]{1,100}\Z")]


class Annotations(msgspec.Struct, frozen=True):
    """Annotations of an alert."""

    summary: str = ""


class Alert(msgspec.Struct, frozen=True, rename={"began": "startsAt"}):
    """An alert of a notification, and when it began."""

    status: Literal["firing", "resolved"]
    labels: Labels
    began: Annotated[datetime, msgspec.Meta(tz=True)]
    annotations: Annotations = Annotations()

    @property
    def reason(self) -> str:
        """The summary in one line; what fires if there is none."""
        words = "".join(letter if letter.isprintable() else " " for letter in self.annotations.summary).split()
        return " ".join(words)[:MOST_TEXT] or f"{self.labels.alertname} fires"


class Notification(msgspec.Struct, frozen=True):
    """What Alertmanager's webhook sends."""

    version: Literal["4"]
    alerts: Annotated[list[Alert], msgspec.Meta(min_length=1)]


def _pin_before(registry: Registry, alert: Alert, now_ms: int) -> str:
    control = current(registry)
    if control.serving.mode == "pin":
        return f"answers stay at version {control.serving.version} already; nothing was changed"
    limit_ms = round(alert.began.timestamp() * 1000) - BEFORE_MS
    branch = ServingBranch(registry, control)
    newest = branch.last(lambda version: version.created_at_ms < limit_ms)
    if newest is None:
        raise UnknownVersion(
            f"no version of the serving branch was made before {iso(limit_ms)}",
            "pin an older version by hand: `springtide pin`",
        )
    version = branch.loadable(newest)
    actor = f"{ACTOR}: {alert.labels.alertname}"
    registry.propose(transitions.pin(control, version.version, actor=actor, reason=alert.reason, now_ms=now_ms))
    return f"answers stay at {described(version)}; `springtide follow` undoes it"


class Webhook:
    """The ASGI application: accepts notifications on one path, with a token of the role `operate`.

    Attributes:
        draining: Whether the process is about to end.
    """

    def __init__(self, settings: Settings, tokens: Tokens, now_ms: Callable[[], int]) -> None:
        self._settings, self._tokens, self._now_ms = settings, tokens, now_ms
        alerts = Endpoint(
            "alerts", ("POST",), PATH, self._notified, body=(Notification,), example=EXAMPLE, role=OPERATE
        )
        self._routes = Routes([alerts])
        self.draining = False

    def count_refused(self, reason: str) -> None:
        """Logs what was refused before it was a request."""
        _log.warning("a connection was refused: %s", reason)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        try:
            endpoint, placeholders = self._routes.find(scope)
            self._tokens.require(header(scope, b"authorization"), endpoint.role)
            length = header(scope, b"content-length") or "0"
            if not length.isdecimal() or int(length) > MOST_BYTES:
                raise BadRequest(
                    f"the body has {length:.20} bytes", f"at most {MOST_BYTES} are accepted", http_status=413
                )
            response = await endpoint.answer(Request(scope, receive, placeholders, endpoint, MOST_BYTES))
        except SpringtideError as error:
            response = failure(error)
            _log.warning("a notification was refused with %d: %s", response.status, error)
        await answer(send, response._replace(headers=[*response.headers, LAST]))

    async def _notified(self, request: Request) -> Response:
        notification = await request.document()
        return Response(200, encode({"done": await asyncio.to_thread(self._act, notification)}))

    def _act(self, notification: Notification) -> str:
        firing = [alert for alert in notification.alerts if alert.status == "firing"]
        if not firing:
            return "resolved; nothing was changed: `springtide follow` makes answers follow the newest version again"
        first = min(firing, key=lambda alert: alert.began)
        outcome = _pin_before(open_registry(self._settings), first, self._now_ms())
        _log.warning("%s fires: %s", first.labels.alertname, outcome)
        return outcome


def server_of(settings: Settings, now_ms: Callable[[], int]) -> DrainingServer:
    """Returns the server with its tokens, which are created if they are missing, and serving's certificate.

    Raises:
        SettingsError: Tokens or certificate cannot be used.
    """
    make_missing(settings.tokens_dir)
    access, limits = Access.of(settings, always=True), ConnectionLimits(TIMEOUT_S, CONNECTIONS)
    assert access.tokens is not None
    return DrainingServer(Webhook(settings, access.tokens, now_ms), limits, 0.0, access=access)


def run(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        PortTaken: The port is in use.
        SettingsError: Tokens or certificate cannot be used.
    """
    host, port = settings.console.host, settings.up.webhook_port
    bound, server = listen(host, port, "up.metrics_port"), server_of(settings, wall_ms)
    server.end_on_signals()
    _log.info("notifications are received at %s, port %d, %s", *bound.getsockname()[:2], PATH)
    server.run(sockets=[bound])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the receiver with the settings of `argv`; returns the exit code."""
    return run_part("webhook", run, argv, _log)


if __name__ == "__main__":
    sys.exit(main())
