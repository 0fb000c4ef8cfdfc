"""Receives Alertmanager notifications over HTTP and pins serving to the last good version: `springtide webhook`.

`docs/operate/monitoring.md` shows how to configure both ends. The format is version 4 of Alertmanager's webhook JSON:
https://prometheus.io/docs/alerting/latest/configuration/#webhook_config

A firing alert pins serving to the newest version from before the alert. It never changes what an operator decided.
A resolved alert changes nothing: an operator checks first and then lets serving follow the newest version again.

Only POST on one path changes anything. It always needs a token of the role `operate`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from deploy.operate.branch import ServingBranch, described
from deploy.operate.control import current
from deploy.operate.times import iso, parse_time
from deploy.operate.versions import open_registry
from deploy.serving.requests.access import OPERATE, Access, Certificate, Tokens, make_missing
from deploy.serving.requests.connections import ConnectionLimits
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
from deploy.serving.requests.server import DrainingServer, listen
from state.config.settings import Settings
from state.errors import (
    BadRequest,
    SettingsError,
    SpringtideError,
    UnknownVersion,
)
from state.process.part import run_part
from state.process.wall_clock import wall_ms
from state.registry import control as transitions
from state.registry.registry import Registry

VERSION = "4"
BEFORE_MS = 60_000  # the version must be older than the alert by this much: the problem began before its alert
MOST_TEXT = 300
ACTOR = "alertmanager"
PATH = "/v1/alerts"
MOST_BYTES = 1 << 20
TIMEOUT_S = 10.0
CONNECTIONS = 64
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Notification:
    """The alert of a notification that began first; `summary` is its text."""

    alert: str
    began_ms: int
    summary: str


def firing(body: bytes) -> Notification | None:
    """Returns the earliest alert that fires; None if all are resolved.

    >>> one = {"status": "firing", "labels": {"alertname": "A"}, "annotations": {}, "startsAt": "2026-05-01T00:00:00Z"}
    >>> firing(orjson.dumps({"version": "4", "alerts": [one]}))
    Notification(alert='A', began_ms=1777593600000, summary='')
    >>> firing(orjson.dumps({"version": "4", "alerts": [one | {"status": "resolved"}]}))

    Raises:
        BadRequest: The body is no notification of version 4.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is no JSON ({error})", "send what Alertmanager's webhook sends") from None
    if not isinstance(document, dict) or document.get("version") != VERSION:
        raise BadRequest("the body is no notification of version 4", "send what Alertmanager's webhook sends")
    alerts = document.get("alerts")
    if not isinstance(alerts, list) or not alerts:
        raise BadRequest("the notification has no alerts", "send what Alertmanager's webhook sends", "/alerts")
    firing_alerts = [_alert(alert, number) for number, alert in enumerate(alerts)]
    return min((alert for alert in firing_alerts if alert is not None), key=lambda alert: alert.began_ms, default=None)


def _alert(alert: Any, number: int) -> Notification | None:
    where = f"/alerts/{number}"
    if not isinstance(alert, dict) or alert.get("status") not in ("firing", "resolved"):
        raise BadRequest("the status of an alert is firing or resolved", where=f"{where}/status")
    labels, annotations = alert.get("labels"), alert.get("annotations", {})
    name = labels.get("alertname") if isinstance(labels, dict) else None
    # The name goes into the audit log, so it must not contain a line break.
    if not isinstance(name, str) or not re.fullmatch(r"[\w:-]{1,100}", name, re.ASCII):
        raise BadRequest("the name of an alert consists of letters, digits and _:-", where=f"{where}/labels/alertname")
    summary = annotations.get("summary", "") if isinstance(annotations, dict) else ""
    try:
        began_ms = parse_time(str(alert["startsAt"]), 0)
    except (KeyError, SettingsError):
        raise BadRequest("an alert needs the time at which it began", where=f"{where}/startsAt") from None
    if alert["status"] == "resolved":
        return None
    words = "".join(letter if letter.isprintable() else " " for letter in str(summary)).split()
    return Notification(name, began_ms, " ".join(words)[:MOST_TEXT])


def _pin_before(registry: Registry, notification: Notification, now_ms: int) -> str:
    """Pins serving to a version from before an alert; returns what was done. Idempotent; durable when it returns.

    Raises:
        UnknownVersion: No such version is kept.
        ControlConflict: Another client changed control in the meantime; Alertmanager repeats the notification.
        RegistryError: There is no control yet.
    """
    control = current(registry)
    if control.serving.mode == "pin":
        return f"answers stay at version {control.serving.version} already; nothing was changed"
    limit_ms = notification.began_ms - BEFORE_MS
    branch = ServingBranch(registry, control)
    newest = branch.last(lambda version: version.created_at_ms < limit_ms)
    if newest is None:
        raise UnknownVersion(
            f"no version of the serving branch was made before {iso(limit_ms)}",
            "pin an older version by hand: `springtide pin`",
        )
    version = branch.loadable(newest)
    actor = f"{ACTOR}: {notification.alert}"
    reason = notification.summary or f"{notification.alert} fires"
    registry.propose(transitions.pin(control, version.version, actor=actor, reason=reason, now_ms=now_ms))
    return f"answers stay at {described(version)}; `springtide follow` undoes it"


class Webhook:
    """The ASGI application: accepts notifications on one path, with a token of the role `operate`.

    Attributes:
        draining: Whether the process is about to end.
    """

    def __init__(self, settings: Settings, tokens: Tokens, now_ms: Callable[[], int]) -> None:
        self._settings, self._tokens, self._now_ms = settings, tokens, now_ms
        self._routes = Routes([Endpoint("alerts", ("POST",), PATH, self._notified, role=OPERATE)])
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
        body = await request.body()
        return Response(200, encode({"done": await asyncio.to_thread(self._act, body)}))

    def _act(self, body: bytes) -> str:
        notification = firing(body)
        if notification is None:
            return "resolved; nothing was changed: `springtide follow` makes answers follow the newest version again"
        outcome = _pin_before(open_registry(self._settings), notification, self._now_ms())
        _log.warning("%s fires: %s", notification.alert, outcome)
        return outcome


def server_of(settings: Settings, now_ms: Callable[[], int]) -> DrainingServer:
    """Returns the server with its tokens, which are created if they are missing, and serving's certificate.

    Raises:
        SettingsError: Tokens or certificate cannot be used.
    """
    for path in make_missing(settings.tokens_dir):
        _log.info("created a token: %s", path)
    serving, tokens = settings.serving, Tokens(settings.tokens_dir)
    certificate = Certificate(Path(serving.tls_cert), Path(serving.tls_key)) if serving.tls_cert else None
    limits = ConnectionLimits(TIMEOUT_S, CONNECTIONS)
    return DrainingServer(Webhook(settings, tokens, now_ms), limits, 0.0, access=Access(certificate, tokens))


def run(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        PortTaken: The port is in use.
        SettingsError: Tokens or certificate cannot be used.
    """
    host, port = settings.console.host, settings.webhook.port
    bound, server = listen(host, port, "webhook.port"), server_of(settings, wall_ms)
    server.end_on_signals()
    _log.info("notifications are received at %s, port %d, %s", *bound.getsockname()[:2], PATH)
    server.run(sockets=[bound])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the receiver with the settings of `argv`; returns the exit code."""
    return run_part("webhook", run, argv, _log)


if __name__ == "__main__":
    sys.exit(main())
