"""A console of a registry with five versions, reached over HTTP as a browser and an operator reach it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest

from deploy.console.server import Console, RequestGuard, access_of, open_to_read
from deploy.serving.requests.access import OPERATE, READ, tokens_in
from deploy.serving.requests.server import ConnectionLimits, DrainingServer, listen
from state.config.loading import load
from state.config.settings import Settings
from state.process.network import free_port
from tests.deploy.operating import NOW_MS, Operator

PORTS = ("stream.metrics_port", "trainer.metrics_port", "serving.metrics_port", "serving.port", "up.metrics_port")


@pytest.fixture
def settings(operator: Operator) -> Settings:
    """Those of the operator's registry; nothing else runs."""
    flags = [word for name in PORTS for word in (f"--{name}", str(free_port()))]
    servers = ["--bootstrap-servers", f"127.0.0.1:{free_port()}", "--kafka.request_timeout_s", "1"]
    return load([*flags, *servers, "--paths.state", str(operator.state)], env={})


class Reached:
    """A console that answers.

    Attributes:
        url: Where.
        app: The application.
    """

    def __init__(self, settings: Settings, guard: RequestGuard) -> None:
        self.settings = settings
        self.app = Console(settings, guard, lambda: NOW_MS)
        bound = listen("127.0.0.1", 0, "console.port")
        self.url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        self._server = DrainingServer(self.app, ConnectionLimits(60.0, 100, guard.open_to_read), drain_s=0.0)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [bound]})
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.005)

    def client(self, role: str = "", **headers: str) -> httpx.Client:
        """A client with the token of a role."""
        if role:
            headers["authorization"] = f"Bearer {tokens_in(self.settings.tokens_dir / role)[0]}"
        return httpx.Client(base_url=self.url, headers=headers, timeout=30.0, trust_env=False, verify=False)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture
def console(settings: Settings) -> Iterator[Reached]:
    """One that whoever reaches it may read."""
    guard = access_of(settings)[1]
    assert guard.open_to_read and open_to_read(settings)
    made = Reached(settings, guard)
    yield made
    made.close()


@pytest.fixture
def closed_console(settings: Settings) -> Iterator[Reached]:
    """One that needs a token for whatever it shows, as where others reach the port."""
    settings = replace(settings, serving=replace(settings.serving, tokens="on"))
    made = Reached(settings, access_of(settings)[1])
    yield made
    made.close()


@pytest.fixture
def operating(console: Reached) -> Iterator[httpx.Client]:
    """A client that may change things."""
    with console.client(OPERATE) as client:
        yield client


@pytest.fixture
def reading(closed_console: Reached) -> Iterator[httpx.Client]:
    """A client that may read alone."""
    with closed_console.client(READ) as client:
        yield client
