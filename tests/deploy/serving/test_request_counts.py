"""Metrics of serving: requests by version, and ages of what answers."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, product

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from deploy.serving.answers.host import Host
from deploy.serving.applier import show_ages
from deploy.serving.following.versions import show_control
from deploy.serving.requests.grpc_server import CODES
from deploy.serving.requests.worker_metrics import RequestCounts
from deploy.serving.rest import UNKNOWN, App
from state.config.settings import Settings
from state.events.identity import Salt
from state.features.mask import Mask
from state.metrics import ANSWERING_ROUTES, OTHER_ROUTES, ApplierMetrics, WorkerMetrics, add_process
from state.registry.control import roll_back, start
from state.rows.reader import Served

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
    counted.version = 0
    counted.answer(0.1)
    assert counted.exemplars() == [], "no version has answered yet"
    counted.version = 7
    counted.answer(0.0041)
    counted.version = 8
    counted.answer(0.0042)
    assert counted.exemplars() == [("0.005", "7", 0.0041)]
    counted.answer(0.3)
    assert counted.exemplars() == [("0.005", "7", 0.0041), ("0.5", "8", 0.3)]
    counted.now_s += 1.0
    counted.answer(0.0043)
    assert counted.exemplars() == [("0.005", "8", 0.0043), ("0.5", "8", 0.3)]


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


SERVED = Served(
    version=7, epoch=1, parent=6, serial=1, lane=0, visible=((1, 7),), dims={}, created_at_ms=4_000,
    event_time_ms=2_000, applied_at_ms=5_000, spec="", program="", salt="", mask_generation=0, sources={},
)  # fmt: skip


@pytest.fixture
def collected() -> CollectorRegistry:
    return CollectorRegistry()


def test_the_masks_of_control_are_counted(collected: CollectorRegistry) -> None:
    control = start(actor="ann", reason="test", now_ms=0)
    masked = roll_back(control, 1, Mask(times=((0, 9), (20, 30))), actor="ann", reason="test", now_ms=1)
    metrics = ApplierMetrics(collected)
    show_control(control, metrics)
    assert collected.get_sample_value("springtide_serving_masks") == 0
    show_control(masked, metrics)
    assert collected.get_sample_value("springtide_serving_masks") == 2
    assert collected.get_sample_value("springtide_serving_control_generation") == masked.generation


def test_ages_are_from_the_version_its_newest_click_and_the_newest_click_here(collected: CollectorRegistry) -> None:
    metrics = ApplierMetrics(collected)
    show_ages(None, 0, 10_000, metrics)
    show_ages(replace(SERVED, event_time_ms=0), 0, 10_000, metrics)
    assert collected.get_sample_value("springtide_serving_weight_age_seconds_count") == 0, "of none there is no age"
    show_ages(SERVED, 9_500, 10_000, metrics)
    assert collected.get_sample_value("springtide_serving_version_age_seconds") == 6.0
    assert collected.get_sample_value("springtide_serving_weight_freshness_seconds") == 8.0
    assert collected.get_sample_value("springtide_serving_feature_freshness_seconds") == 0.5


def test_a_weight_age_names_its_version(collected: CollectorRegistry) -> None:
    show_ages(SERVED, 0, 10_000, ApplierMetrics(collected))
    found = [
        sample.exemplar
        for family in collected.collect()
        for sample in family.samples
        if family.name == "springtide_serving_weight_age_seconds" and sample.exemplar
    ]
    assert [(one.labels, one.value) for one in found] == [({"version": "7"}, 8.0)]
