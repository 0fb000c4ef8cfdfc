"""Requests are counted by route and code, timed where a version answers, and name that version now and then; all of it in few series."""

from __future__ import annotations

from itertools import chain, product

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from deploy.serving.answers.host import Host
from deploy.serving.requests.grpc_server import CODES
from deploy.serving.requests.worker_metrics import RequestCounts
from deploy.serving.rest import UNKNOWN, App
from state.config.settings import Settings
from state.events.identity import Salt
from state.metrics import ANSWERING_ROUTES, OTHER_ROUTES, WorkerMetrics, add_process

MOST_SERIES = 300


class Counted:
    """Requests of a clock that one sets."""

    def __init__(self) -> None:
        self.registry, self.now_s, self.version = CollectorRegistry(), 100.0, 7
        metrics = WorkerMetrics(self.registry)
        self.counts = RequestCounts(metrics, lambda: self.version or None, lambda: self.now_s)

    def answer(self, took_s: float, route: str = "profile") -> None:
        self.counts.count(route, "200", self.now_s - took_s)

    def exemplars(self) -> list[tuple[str, str, float]]:
        """Bucket, version and seconds of each."""
        families = text_string_to_metric_families(openmetrics(self.registry).decode())
        samples = chain.from_iterable(family.samples for family in families)
        return [
            (one.labels["le"], one.exemplar.labels["version"], round(one.exemplar.value, 6))
            for one in samples
            if one.exemplar
        ]


@pytest.fixture
def counted() -> Counted:
    return Counted()


def test_a_bucket_names_the_version_of_one_of_its_requests_a_second(counted: Counted) -> None:
    counted.answer(0.0041)
    counted.version = 8
    counted.answer(0.0042)
    assert counted.exemplars() == [("0.005", "7", 0.0041)]
    counted.answer(0.3)
    assert counted.exemplars() == [("0.005", "7", 0.0041), ("0.5", "8", 0.3)]
    counted.now_s += 1.0
    counted.answer(0.0043)
    assert counted.exemplars() == [("0.005", "8", 0.0043), ("0.5", "8", 0.3)]


def test_a_request_beyond_the_last_bucket_has_one_too(counted: Counted) -> None:
    counted.answer(60.0)
    assert counted.exemplars() == [("+Inf", "7", 60.0)]


def test_before_the_first_answer_no_version_is_named(counted: Counted) -> None:
    counted.version = 0
    counted.answer(0.1)
    assert counted.exemplars() == []


def test_what_no_version_answers_is_timed_together(counted: Counted) -> None:
    for route in ("healthz", "docs"):
        counted.answer(0.1, route)
    value = counted.registry.get_sample_value
    assert value("springtide_requests_total", {"route": "docs", "code": "200"}) == 1
    assert value("springtide_request_seconds_count", {"route": OTHER_ROUTES}) == 2
    assert value("springtide_request_seconds_count", {"route": "docs"}) is None


def routes(settings: Settings) -> tuple[set[str], set[str]]:
    """All that a worker may be asked, over HTTP and gRPC."""
    app = App(Host(settings, Salt(bytes(32)), now_ms=lambda: 0), CollectorRegistry())
    return {one.name for one in app.endpoints} | {UNKNOWN}, {
        f"/{service.name}/{method.name}" for service in app.grpc_services() for method in service.methods
    }


def test_every_route_that_is_timed_apart_is_offered() -> None:
    over_http, over_grpc = routes(Settings())
    assert set(ANSWERING_ROUTES) <= over_http | over_grpc


def test_a_worker_has_few_series_whatever_it_is_asked() -> None:
    """Each route answered and refused, which is more than those see that ask what there is."""
    registry = CollectorRegistry()
    add_process(registry)
    metrics = WorkerMetrics(registry)
    counts = RequestCounts(metrics, lambda: 7)
    over_http, over_grpc = routes(Settings())
    for route, code in chain(product(over_http, ("200", "400")), product(over_grpc, ("OK", CODES[400].name))):
        counts.count(route, code, 0.0)
    for reason in ("no_http", "host", "head", "slow", "connections"):
        metrics.refused.labels(reason).inc()
    series = [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]
    assert len(series) <= MOST_SERIES, f"{len(series)} series"
