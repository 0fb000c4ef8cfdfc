"""The webhook's process: `springtide webhook` takes Alertmanager's notifications and pins; `deploy/prometheus/README.md` shows both ends.

Only POST on one path changes something, and only with a token of the role
operate, also where answers need none. A resolved alert changes nothing: an
operator looks first, and lets answers follow.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import orjson

from deploy.alerting.notification import firing
from deploy.alerting.pinning import pin_before
from deploy.operate.versions import open_registry
from deploy.serving.edge.tls import Certificate
from deploy.serving.edge.tokens import OPERATE, Tokens, make_missing
from state.config.loading import load
from state.config.settings import Settings
from state.errors import BadRequest, PortTaken, SpringtideError, TooLarge, UnknownPath, WrongMethod, of_disk
from state.process import log_lines
from state.process.private_files import keep_private
from state.process.wall_clock import wall_ms

PATH = "/v1/alerts"
MOST_BYTES = 1 << 20
TIMEOUT_S = 10.0
_log = logging.getLogger(__name__)


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
        """Lets through whoever may operate.

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
            # Read before anything is refused: what is left unread would cut the answer off.
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
