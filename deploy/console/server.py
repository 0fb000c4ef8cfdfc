"""The console's process: `python -m deploy.console.server [flags]`, `springtide console`; one of those under `springtide up`.

A process of its own, and not a part of a serving worker: it reads the registry
and Kafka, changes control, and may wait for seconds, none of which answers to
users are to feel.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from deploy.console.app import Console
from deploy.console.guarding import RequestGuard, open_to_read
from deploy.serving.edge.access import Access
from deploy.serving.edge.connections import ConnectionLimits
from deploy.serving.edge.listening import listen
from deploy.serving.edge.server import DrainingServer
from deploy.serving.edge.tls import Certificate
from deploy.serving.edge.tokens import OPERATE, Tokens, make_missing
from deploy.watch.address import address
from state.config.settings import Settings
from state.errors import SettingsError
from state.process.part import run_part
from state.process.wall_clock import wall_ms

_log = logging.getLogger(__name__)

CONNECTIONS = 256
DRAIN_S = 0.0


def access_of(settings: Settings) -> tuple[Access, RequestGuard]:
    """How the console lets in: by serving's certificate and tokens, which are made where they are missing.

    Raises:
        SettingsError: The files that the settings name cannot be used.
    """
    serving = settings.serving
    for path in make_missing(settings.tokens_dir):
        _log.warning("made a token: %s", path)
    tokens = Tokens(settings.tokens_dir)
    certificate = Certificate(Path(serving.tls_cert), Path(serving.tls_key)) if serving.tls_cert else None
    return Access(certificate, tokens), RequestGuard(tokens, open_to_read(settings))


def run(settings: Settings) -> None:
    """Answers until SIGTERM or SIGINT.

    Raises:
        PortTaken: Somebody listens on the port.
        SettingsError: There is no port, or files cannot be used.
    """
    port, host = settings.console.port, settings.console.host
    if not port:
        raise SettingsError("console.port is 0: the console has no port", "set console.port to a free port")
    access, guard = access_of(settings)
    bound = listen(host, port, "console.port")
    app = Console(settings, guard, wall_ms)
    serving = settings.serving
    limits = ConnectionLimits(serving.max_head_bytes, serving.timeout_s, CONNECTIONS, own_hosts=guard.open_to_read)
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
