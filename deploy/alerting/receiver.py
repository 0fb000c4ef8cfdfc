"""Receives Alertmanager notifications over HTTP and pins serving to the last good version: `springtide webhook`.

`deploy/prometheus/README.md` shows how to configure both ends.
The notification format is version 4 of Alertmanager's webhook JSON:
https://prometheus.io/docs/alerting/latest/configuration/#webhook_config

A firing alert pins serving to the newest version that existed before the alert began. A decision
that an operator made is not changed. A resolved alert changes nothing: an operator checks first and
then lets serving follow the newest version again.

Only POST on one path changes anything. It always needs a token of the role `operate`, even where
read requests need no token.
"""

from __future__ import annotations

import logging
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import orjson

from deploy.operate.branch import ServingBranch, described
from deploy.operate.commands import current
from deploy.operate.times import iso, parse_time
from deploy.operate.versions import open_registry
from deploy.serving.requests.access import OPERATE, Certificate, Tokens, make_missing
from state.config.loading import load
from state.config.settings import Settings
from state.errors import (
    BadRequest,
    PortTaken,
    SettingsError,
    SpringtideError,
    TooLarge,
    UnknownPath,
    UnknownVersion,
    WrongMethod,
    of_disk,
)
from state.process import log_lines
from state.process.private_files import keep_private
from state.process.wall_clock import wall_ms
from state.registry import control as transitions
from state.registry.registry import Registry

VERSION = "4"
MOST_TEXT = 300
ACTOR = "alertmanager"
PATH = "/v1/alerts"
MOST_BYTES = 1 << 20
TIMEOUT_S = 10.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Notification:
    """The alert of a notification that began first.

    Attributes:
        alert: Its name.
        began_ms: When it began to fire.
        summary: Its text.
    """

    alert: str
    began_ms: int
    summary: str


def firing(body: bytes) -> Notification | None:
    """The first of the alerts that fire; None where all are resolved.

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
        raise BadRequest("it has no alerts", "send what Alertmanager's webhook sends", "/alerts")
    found = [_alert(one, number) for number, one in enumerate(alerts)]
    return min((one for one in found if one is not None), key=lambda one: one.began_ms, default=None)


def _alert(found: Any, number: int) -> Notification | None:
    where = f"/alerts/{number}"
    if not isinstance(found, dict) or found.get("status") not in ("firing", "resolved"):
        raise BadRequest("an alert has the status firing or resolved", where=f"{where}/status")
    labels, annotations = found.get("labels"), found.get("annotations", {})
    name = labels.get("alertname") if isinstance(labels, dict) else None
    # The name goes into the audit log, so it must not contain a line break.
    if not isinstance(name, str) or not re.fullmatch(r"[\w:-]{1,100}", name, re.ASCII):
        raise BadRequest("an alert has a name of letters, digits and _:-", where=f"{where}/labels/alertname")
    summary = annotations.get("summary", "") if isinstance(annotations, dict) else ""
    try:
        began_ms = parse_time(str(found["startsAt"]), 0)
    except (KeyError, SettingsError):
        raise BadRequest("an alert has a time at which it began", where=f"{where}/startsAt") from None
    if found["status"] == "resolved":
        return None
    words = "".join(one if one.isprintable() else " " for one in str(summary)).split()
    return Notification(name, began_ms, " ".join(words)[:MOST_TEXT])


def pin_before(registry: Registry, notification: Notification, before_s: float, now_ms: int) -> str:
    """Pins serving and returns what was done; a repeated call changes nothing. Durable when it returns.

    Args:
        registry: Where versions and control are.
        notification: The alert.
        before_s: How long before the alert began a version must have been made: the trouble is older than its alert.
        now_ms: Wall clock.

    Raises:
        UnknownVersion: No such version is kept.
        ControlConflict: Somebody else changed control meanwhile; Alertmanager asks again by itself.
        RegistryError: There is no control yet.
    """
    control = current(registry)
    if control.serving.mode == "pin":
        return f"answers stay at version {control.serving.version} already; nothing was changed"
    limit_ms = notification.began_ms - round(1000 * before_s)
    branch = ServingBranch(registry, control)
    found = branch.last(lambda version: version.created_at_ms < limit_ms)
    if found is None:
        raise UnknownVersion(
            f"no version of the serving branch was made before {iso(limit_ms)}",
            "lower webhook.before_s, or pin by hand",
        )
    version = branch.loadable(found)
    actor = f"{ACTOR}: {notification.alert}"
    reason = notification.summary or f"{notification.alert} fires"
    registry.propose(transitions.pin(control, version.version, actor=actor, reason=reason, now_ms=now_ms))
    return f"answers stay at {described(version)}; `springtide follow` undoes it"


class Webhook:
    """What a notification does.

    Args:
        settings: Where the registry is, and how long before an alert a version must be.
        tokens: Who may.
        now_ms: Wall clock.
    """

    def __init__(self, settings: Settings, tokens: Tokens, now_ms: Callable[[], int]) -> None:
        self._settings, self._tokens, self._now_ms = settings, tokens, now_ms

    def let_in(self, authorization: str | None) -> None:
        """Accepts only requests with the role `operate`.

        Raises:
            Unauthorized: There is no token, or none of ours.
            Forbidden: It may only read.
        """
        self._tokens.look()
        self._tokens.require(authorization, OPERATE)

    def take(self, body: bytes) -> str:
        """Does what a notification asks for; returns what was done.

        Raises:
            SpringtideError: It is none, or cannot be done.
        """
        found = firing(body)
        if found is None:
            return "resolved; nothing was changed: `springtide follow` lets answers follow again"
        registry = open_registry(self._settings)
        done = pin_before(registry, found, self._settings.webhook.before_s, self._now_ms())
        _log.warning("%s fires: %s", found.alert, done)
        return done


class _Handler(BaseHTTPRequestHandler):
    webhook: ClassVar[Webhook]
    timeout = TIMEOUT_S
    server_version, sys_version = "springtide", ""

    def _answer(self) -> None:
        try:
            # Read the body before any refusal: unread bytes would cut the answer off.
            body = self._body()
            if self.path != PATH:
                raise UnknownPath(f"nothing answers at {self.path!r:.100}", f"POST {PATH}")
            if self.command != "POST":
                raise WrongMethod(f"{self.command} changes nothing", f"POST {PATH}")
            self.webhook.let_in(self.headers.get("authorization"))
            status, document = 200, {"done": self.webhook.take(body)}
            headers: tuple[tuple[bytes, bytes], ...] = ()
        except SpringtideError as error:
            status, document, headers = error.http_status, {"error": str(error)}, error.http_headers
            _log.warning("a notification was refused with %d: %s", status, error)
        sent = orjson.dumps(document)
        self.send_response(status)
        for name, value in headers:
            self.send_header(name.decode(), value.decode())
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(sent)))
        self.send_header("connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)

    def _body(self) -> bytes:
        length = self.headers.get("content-length", "0")
        if not length.isdecimal():
            raise BadRequest("the request does not say how long it is", "send Content-Length")
        if int(length) > MOST_BYTES:
            raise TooLarge(f"the body has {length:.20} bytes", f"at most {MOST_BYTES} are taken")
        return self.rfile.read(int(length))

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _answer

    def log_message(self, format: str, *args: object) -> None:
        """What matters is logged where it is done."""


def serve(settings: Settings, now_ms: Callable[[], int]) -> ThreadingHTTPServer:
    """Listens on `webhook.host` and `webhook.port`; nothing is answered before `serve_forever`.

    Raises:
        PortTaken: The port is in use.
        SettingsError: Tokens or certificate cannot be used.
    """
    for path in make_missing(settings.tokens_dir):
        _log.info("made a token: %s", path)
    handler = type("Handler", (_Handler,), {"webhook": Webhook(settings, Tokens(settings.tokens_dir), now_ms)})
    host, port = settings.webhook.host, settings.webhook.port
    try:
        server = ThreadingHTTPServer((host, port), handler)
    except OSError as problem:
        raise PortTaken(f"port {port} on {host} cannot be had ({problem.strerror})", "set webhook.port") from None
    server.daemon_threads = True
    if settings.serving.tls_cert:
        context = Certificate(Path(settings.serving.tls_cert), Path(settings.serving.tls_key)).context
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    return server


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m deploy.alerting.receiver [flags]`; returns the exit code."""
    keep_private()
    log_lines.begin("webhook")
    try:
        settings = load(sys.argv[1:] if argv is None else argv)
        log_lines.follow(settings.logs)
        server = serve(settings, wall_ms)
    except (SpringtideError, OSError) as problem:
        error = of_disk(problem)
        _log.error("%s: %s", type(error).__name__, error)
        return error.exit_code
    for number in (signal.SIGTERM, signal.SIGINT):
        # Not in the handler: `shutdown` waits for the loop that the handler interrupts.
        signal.signal(number, lambda *_: Thread(target=server.shutdown, daemon=True).start())
    _log.info("notifications are taken at %s, port %d, %s", *server.server_address[:2], PATH)
    with server:
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
