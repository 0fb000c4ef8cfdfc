"""What the console shows: its pages, the state, lists and curves."""

from __future__ import annotations

import gc
import hashlib
import json
import re
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import CollectorRegistry

from deploy import status
from deploy.console import server as pages
from deploy.console.server import CURVES, LIFT, MOST_PROBLEMS, QUANTILES, STATIC, Curves, PastProblems
from deploy.serving.requests.access import OPEN
from deploy.watch.figures import Figures
from deploy.watch.snapshot import Problem
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
        # Both clocks are before it: the host has just started.
        metrics.began.set(4e9)
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
    lists = {"versions": ("--last", "40"), "history": ("--last", "40"), "masks": (), "jumps": ("--minutes", "5")}
    for name, words in lists.items():
        assert operating.get(f"/api/{name}").json() == json.loads(operator(name, *words, "-o", "json")), name
    assert [one["version"] for one in operating.get("/api/versions?last=2").json()] == [4, 5]
    assert operating.get("/api/versions?last=0").status_code == 400


def test_jumps_name_users_and_need_the_token_that_operates(reading: httpx.Client) -> None:
    assert reading.get("/api/masks").status_code == 200
    assert reading.get("/api/jumps").status_code == 403


def test_problems_of_the_last_day_end_return_and_are_forgotten() -> None:
    past, minute_ms, day_ms = PastProblems(0), 60_000, 86_400_000
    lag = Problem("warning", "12,000 clicks wait", "the-stream-lags", "stream")
    for at_ms in (0, minute_ms, 3 * minute_ms):
        past.add(at_ms, [lag])
    found = past.document(3 * minute_ms)["problems"]
    assert [(one["first_ms"], one["last_ms"], one["open"]) for one in found] == [
        (0, minute_ms, False),
        (3 * minute_ms, 3 * minute_ms, True),
    ]
    past.add(2 * day_ms, [])
    assert past.document(2 * day_ms) == {"since_ms": day_ms, "problems": []}
    for at_ms in range(0, 300 * day_ms // 1000, day_ms // 1000):
        past.add(2 * day_ms + at_ms, [lag])
    assert len(past.document(3 * day_ms)["problems"]) == MOST_PROBLEMS


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


UPLOT = "1.6.32"
RELEASED = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}
"""SHA-256 of what npm's package uplot of that version has."""
OURS = [path for path in STATIC.rglob("*") if path.suffix in pages.KINDS and path.parent.name != "uplot"]


def test_uplot_is_the_one_that_was_released() -> None:
    folder = STATIC / "uplot"
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert found == RELEASED
    assert f"(v{UPLOT})" in (folder / "uPlot.iife.min.js").read_text()[:100]
    assert "MIT" in (folder / "LICENSE").read_text()


def test_the_page_loads_its_own_files_alone_and_has_nothing_inline() -> None:
    assert len(OURS) > 8
    for path in OURS:
        # The runbook names addresses; it loads none.
        text = re.sub(r'xmlns="[^"]*"|const SVG = "[^"]*"|<code>[^<]*</code>', "", path.read_text())
        assert not re.search(r"https?://|//cdn|@import|url\(", text), path.name
    html = (STATIC / "index.html").read_text()
    assert not re.search(r"<style|<script(?![^>]* src=)|\sstyle=|\son\w+=", html)
    named = re.findall(r'(?:src|href)="([^"#]+)"', html)
    assert named and all((STATIC / name).is_file() for name in named)
    # What is shown is text: a name that a click brought is never taken for markup.
    assert not any("innerHTML" in path.read_text() or "insertAdjacentHTML" in path.read_text() for path in OURS)


def test_each_file_is_had_without_a_token_and_sent_once(closed_console: Reached) -> None:
    offered = [one for one in closed_console.app.endpoints if one.name == "page"]
    assert len(offered) == len(OURS) + 2 and {one.role for one in offered} == {OPEN}
    with closed_console.client() as client:
        for one in offered:
            answer = client.get(one.path)
            assert answer.status_code == 200 and answer.content
            again = client.get(one.path, headers={"if-none-match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            assert client.head(one.path).status_code == 200
        assert client.get("/").headers["content-type"] == "text/html; charset=utf-8"
        for path in ("/index.html", "/../app.py", "/%2e%2e/app.py", "/uplot/LICENSE"):
            assert client.get(path).status_code in (401, 404)
