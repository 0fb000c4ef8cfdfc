"""Who may read and change something on the console, and what of that is counted."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.console import server
from deploy.serving.requests.access import OPERATE, READ, tokens_in
from deploy.startup import prometheus
from deploy.watch import scrape
from deploy.watch.scrape import console_address
from state import metrics
from state.config.loading import load
from state.process.network import free_port
from tests import forked
from tests.deploy.console.conftest import Reached
from tests.deploy.operating import Operator
from tests.deploy.serving.edge.certificates import write_certificate
from tests.deploy.serving.test_rest import until

HOLD = {"generation": 1, "reason": "look first"}


def path_of(endpoint: Any) -> str:
    return str(endpoint.path).replace("{user_id}", "ann")


def test_without_a_token_only_the_page_itself_is_had_where_tokens_are_wanted(closed_console: Reached) -> None:
    with closed_console.client() as client:
        answered = {
            one.name for one in closed_console.app.endpoints
            if client.request(one.methods[0], path_of(one), json=HOLD if "POST" in one.methods else None).status_code != 401
        }  # fmt: skip
    assert answered == {"page", "session"}


def test_a_reader_reads_and_changes_nothing(reading: httpx.Client, operator: Operator) -> None:
    assert reading.get("/api/session").json() == {"open_to_read": False, "role": "read"}
    assert [one["version"] for one in reading.get("/api/versions").json()] == [1, 2, 3, 4, 5]
    for verb in ("plan", "rollback", "pin", "follow", "hold", "release", "pause", "resume", "unmask"):
        answer = reading.post(f"/api/{verb}", json=HOLD)
        assert (answer.status_code, answer.json()["do"]) == (403, "send one of the role operate")
    assert len(operator.registry.controls()) == 1


def test_changing_needs_the_token_also_where_reading_does_not(console: Reached, operator: Operator) -> None:
    with console.client() as client:
        assert client.get("/api/history").status_code == 200
        assert client.post("/api/hold", json=HOLD).status_code == 401
    with console.client(READ) as client:
        assert client.post("/api/hold", json=HOLD).status_code == 403
    assert len(operator.registry.controls()) == 1
    with console.client(OPERATE) as client:
        assert client.get("/api/session").json()["role"] == "operate"
        assert client.post("/api/hold", json=HOLD).status_code == 200
    assert [one.action for one in operator.registry.controls()] == ["start", "hold"]


def test_nothing_is_changed_by_get(operating: httpx.Client, console: Reached, operator: Operator) -> None:
    changing = [one.path for one in console.app.endpoints if "POST" in one.methods]
    assert len(changing) == 9
    for path in changing:
        answer = operating.get(path)
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert len(operator.registry.controls()) == 1


def test_what_another_page_or_a_form_could_send_changes_nothing(operating: httpx.Client, operator: Operator) -> None:
    foreign = (
        ({"origin": "https://shop.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"content-type": "text/plain"}, 400),
        ({"content-type": "application/x-www-form-urlencoded"}, 400),
    )
    for headers, status in foreign:
        sent = {"content-type": "application/json"} | headers
        answer = operating.post("/api/hold", content=b'{"generation": 1, "reason": "x"}', headers=sent)
        assert answer.status_code == status, headers
    assert len(operator.registry.controls()) == 1


def test_its_own_page_is_let_in(operating: httpx.Client, console: Reached) -> None:
    answer = operating.post("/api/hold", json=HOLD, headers={"origin": console.url, "sec-fetch-site": "same-origin"})
    assert answer.status_code == 200


def test_a_name_that_leads_here_from_elsewhere_is_refused_where_anybody_may_read(
    console: Reached, closed_console: Reached
) -> None:
    with console.client() as client:
        assert client.get("/api/history", headers={"host": "evil.example"}).status_code == 403
        assert client.get("/api/history", headers={"host": "localhost:8502"}).status_code == 200
    with closed_console.client(READ) as client:
        assert client.get("/api/history", headers={"host": "ops.example"}).status_code == 200


def test_every_answer_tells_the_browser_to_load_nothing_from_elsewhere_and_runs_nothing_inline(
    console: Reached,
) -> None:
    with console.client() as client:
        for path, status in (("/", 200), ("/api/history", 200), ("/none", 404), ("/api/hold", 405)):
            answer = client.get(path)
            assert answer.status_code == status
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "set-cookie" not in answer.headers
            assert answer.headers["cache-control"] == ("no-cache" if path == "/" else "no-store")


REQUESTS = "springtide_console_requests_total"


def test_requests_are_counted_by_how_they_ended_and_all_series_are_declared(console: Reached) -> None:
    with console.client() as client:
        assert client.get("/api/history").status_code == 200
        assert client.get("/api/no-such").status_code == 404
        # Nobody serves here.
        assert client.get("/api/profiles/ann").status_code == 503
        text = client.get("/metrics").text
        assert client.get("/metrics", headers={"accept": "application/openmetrics-text"}).text.endswith("# EOF\n")
    found = scrape.Scrape(scrape.parsed(text))
    assert found.by(REQUESTS, "outcome") == {"answered": 1.0, "refused": 1.0, "failed": 1.0}
    assert {name for name, _ in found.values} <= metrics.names()
    assert found.total("springtide_build_info") == 1.0


def test_who_may_not_read_is_told_nothing_of_it(closed_console: Reached, reading: httpx.Client) -> None:
    with closed_console.client() as client:
        assert client.get("/metrics").status_code == 401
    assert REQUESTS in reading.get("/metrics").text


def test_our_own_prometheus_has_a_token_where_either_of_the_two_is_reached_by_others(tmp_path: Path) -> None:
    state = ["--paths.state", str(tmp_path), "--console.port", "9951"]
    here, served, shown = (
        load([*state, *more], env={}) for more in ([], ["--serving.host", "0.0.0.0"], ["--console.host", "0.0.0.0"])
    )
    assert console_address(here).token_file is None
    for settings in (served, shown):
        assert console_address(settings).token_file == settings.tokens_dir / OPERATE
        (job,) = [one for one in prometheus.configuration(settings)["scrape_configs"] if "console" in one["job_name"]]
        assert job["static_configs"] == [{"targets": ["127.0.0.1:9951"]}] and "authorization" in job
    assert "console" not in scrape.targets(load([*state, "--console.port", "0"], env={}))


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
