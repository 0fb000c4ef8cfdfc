"""Further serving hosts of a running loop: each has a state directory of its own and shares Kafka, salt and registry with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from deploy.operate.versions import rows_here
from deploy.watch import scrape
from deploy.watch.scrape import serving_address
from state.config.loading import load
from state.config.settings import Settings
from state.process.network import free_ports
from state.process.part import die_with
from state.rows.reader import Served
from tests.e2e.running import PATIENCE_S, ROOT, Loop

STOP_S = 60.0


class ServingHost:
    """`springtide serve` in a directory of its own."""

    def __init__(
        self,
        name: str,
        directory: Path,
        loop: Loop,
        own: Mapping[str, object],
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.name, self.log, self._environment = name, directory / "serve.log", environment
        shared = loop.settings
        values = dict(zip(loop.flags[::2], loop.flags[1::2], strict=True)) | {
            "--paths.state": str(directory / "state"),
            "--paths.salt_file": str(shared.salt_path),
            "--kafka.bootstrap_servers": f"127.0.0.1:{shared.kafka.port}",
            **{f"--{name}": str(port) for name, port in free_ports(("serving.port", "serving.metrics_port")).items()},
            "--serving.grpc_port": "0",
        }
        if "paths.shared_registry" not in own:
            values["--paths.registry"] = str(shared.registry_dir.absolute())
        values |= {f"--{one}": str(value) for one, value in own.items()}
        self.flags = [word for pair in values.items() for word in pair]
        self.settings: Settings = load(self.flags, env={})
        self.process: subprocess.Popen[bytes] | None = None
        self.begun_s = 0.0

    def start(self) -> None:
        """Starts it; returns at once."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.begun_s = time.monotonic()
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deploy.serve", *self.flags],
                cwd=ROOT,
                env={name: value for name, value in os.environ.items() if not name.startswith("SPRINGTIDE_")}
                | dict(self._environment),
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with(os.getpid()),
            )

    def stop(self) -> None:
        """Ends it in order."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(STOP_S)
        self.process = None

    def said(self) -> str:
        """The end of its log."""
        return self.log.read_text()[-3000:] if self.log.exists() else ""

    def profile(self, user: str, **query: str) -> dict[str, Any] | None:
        """A profile with all that it can have; None where it cannot be had now."""
        asked = {"fields": "features,vector,attributes,sources", "top": "1000"} | query
        path = f"/v1/profiles/{user}?{urllib.parse.urlencode(asked)}"
        status, body = scrape.fetch(serving_address(self.settings, path), timeout_s=PATIENCE_S)
        if status != 200:
            return None
        found: dict[str, Any] = json.loads(body)
        return found

    def metrics(self, name: str) -> float:
        """A series of its applier."""
        found = scrape.scrape_one(self.settings, "applier").value(name)
        assert found is not None, self.said()
        return found

    @property
    def ready(self) -> bool:
        """Whether it may be given requests."""
        return scrape.fetch(serving_address(self.settings, "/readyz"), timeout_s=PATIENCE_S)[0] == 200

    def served(self) -> Served | None:
        """The version that its rows answer with."""
        with rows_here(self.settings.serving_dir) as reader:
            return None if reader is None else reader.served()
