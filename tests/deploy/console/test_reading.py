"""What the console shows is what the commands print."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import CollectorRegistry

from deploy import status
from deploy.console.watching import CURVES, LIFT, QUANTILES, Curves
from deploy.watch.figures import Figures
from state.metrics import ApplierMetrics, serve
from tests.deploy.console.conftest import Reached
from tests.deploy.operating import Operator


@pytest.fixture
def collected() -> Iterator[None]:
    yield
    gc.collect()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the Kafka client leaves its sockets to the collector
@pytest.mark.usefixtures("collected")
def test_the_state_is_the_document_of_springtide_status(console: Reached) -> None:
    registry = CollectorRegistry()
    metrics = ApplierMetrics(registry)
    stop = serve(registry, console.settings.serving.metrics_port)
    try:
        metrics.version.set(3)
        with console.client() as client:
            found = client.get("/api/state").json()
            series = client.get("/api/series").json()
        printed = status.document(console.settings, status.take(console.settings))
    finally:
        stop()
    assert set(found) - set(printed) == {"at_ms", "sections_age_s"}
    assert set(printed) <= set(found)
    assert (found["figures"]["version"], found["registry"]["newest"]) == (3, printed["registry"]["newest"])
    assert found["problems"] == printed["problems"]
    shown = [problem["text"] for problem in found["problems"]]
    assert shown[:5] == [
        "Kafka unreachable",
        "stream unreachable",
        "trainer unreachable",
        "worker unreachable",
        "applier lag unknown",
    ]
    assert series["curves"]["version"] == [3]
    with console.client() as client:
        assert client.get(f"/api/series?after_ms={series['at_ms'][-1]}").json()["at_ms"] == []


def test_lists_are_those_of_the_commands(operating: httpx.Client, operator: Operator) -> None:
    operator("rollback", "--skip", "1:360-399", "--reason", "bots")
    for name, words in {"versions": ("--last", "40"), "history": ("--last", "40"), "masks": ()}.items():
        assert operating.get(f"/api/{name}").json() == json.loads(operator(name, *words, "-o", "json")), name
    assert [one["version"] for one in operating.get("/api/versions?last=2").json()] == [4, 5]
    assert operating.get("/api/versions?last=0").status_code == 400


def test_curves_keep_the_newest_hour_and_no_more() -> None:
    curves = Curves(5.0, 3600.0)
    for second in range(4000):
        curves.add(1000 * second, Figures(log_loss=float(second)), 0.125)
    found = curves.document()
    assert len(found["at_ms"]) == 720
    assert found["at_ms"][-1] - found["at_ms"][0] == 719 * 5000
    assert found["curves"]["log_loss"][-1] == 3995.0
    assert set(found["curves"]) == {*CURVES, *QUANTILES, LIFT}
    assert {*found["curves"][LIFT]} == {0.125}


def test_without_serving_a_profile_is_503_and_says_why(console: Reached) -> None:
    with console.client() as client:
        answer = client.get("/api/profiles/ann")
    assert (answer.status_code, "does not answer" in answer.json()["error"]) == (503, True)
    assert "ann" not in answer.text, "an error names no user"
