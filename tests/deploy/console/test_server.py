"""The console's process: it takes its port or says why not, lets in as serving does, and ends in order."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from deploy.console import server
from deploy.kafka.configuration import free_port
from deploy.serving.requests.access import READ, tokens_in
from tests import forked
from tests.deploy.operating import Operator
from tests.deploy.serving.edge.certificates import write_certificate
from tests.deploy.serving.test_rest import until


def test_a_process_asks_for_tokens_over_tls_and_ends_in_order(operator: Operator, tmp_path: Path) -> None:
    cert, key, port = tmp_path / "cert.pem", tmp_path / "key.pem", free_port()
    write_certificate(cert, key)
    given = {"TLS_CERT": str(cert), "TLS_KEY": str(key), "TOKENS": "on", "PORT": str(free_port())}
    environment = os.environ | {f"SPRINGTIDE_SERVING_{name}": value for name, value in given.items()}
    line = [sys.executable, "-m", "deploy.console.server", "--console.port", str(port)]
    line += ["--paths.state", str(operator.state)]
    process = forked.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    trusted = ssl.create_default_context(cafile=str(cert))
    try:
        with httpx.Client(
            base_url=f"https://127.0.0.1:{port}", verify=trusted, trust_env=False, timeout=30.0
        ) as client:

            def answers() -> bool:
                assert process.poll() is None
                try:
                    return client.get("/").status_code == 200
                except httpx.TransportError:
                    return False

            until(answers)
            assert client.get("/api/history").status_code == 401
            token = tokens_in(operator.state / "tokens" / READ)[0]
            found = client.get("/api/history", headers={"authorization": f"Bearer {token}"})
            assert [one["action"] for one in found.json()] == ["start"]
        # Another one on the same port says so in a line.
        second = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)
        assert second.returncode == 1 and "console.port" in second.stderr.splitlines()[-1]
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
        assert process.returncode == 0, said
        assert f"https://127.0.0.1:{port}" in said and token not in said
    finally:
        process.kill()
        process.wait()


def test_without_a_port_it_says_what_to_set(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    assert server.main(["--console.port", "0", "--paths.state", str(tmp_path)]) == 2
    assert "set console.port" in caplog.text
