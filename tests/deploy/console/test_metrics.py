"""What the console says on /metrics: how its requests ended, in few series, to whoever may read."""

from __future__ import annotations

from pathlib import Path

import httpx

from deploy.serving.requests.access import OPERATE
from deploy.startup import prometheus
from deploy.watch import scrape
from deploy.watch.address import console_address
from state import metrics
from state.config.loading import load
from tests.deploy.console.conftest import Reached

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
