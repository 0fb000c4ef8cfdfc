"""Metrics: their names, their bounds, and /metrics itself."""

from __future__ import annotations

import platform
import socket
import urllib.request
from importlib import metadata

import pytest
from prometheus_client import CollectorRegistry

from state.errors import PortTaken
from state.metrics import (
    OF_ANY_PROCESS,
    OF_EACH_PROCESS,
    PROCESSES,
    BuildMetrics,
    StreamMetrics,
    names,
    serve,
)
from state.process.network import free_port

FORBIDDEN_LABELS = {"user", "user_id", "item", "item_id", "category", "id", "version"}


@pytest.mark.parametrize("process", [*PROCESSES, *OF_EACH_PROCESS])
def test_every_metric_has_the_prefix_and_a_help_text(process: type) -> None:
    registry = CollectorRegistry()
    process(registry)
    for family in registry.collect():
        assert family.name.startswith("springtide_")
        assert len(family.documentation) > 15
        assert not family.name.endswith(("_ms", "_kb", "_mb")), "base units only"


@pytest.mark.parametrize("process", [*PROCESSES, *OF_EACH_PROCESS])
def test_no_label_carries_an_id(process: type) -> None:
    metrics = process(CollectorRegistry())
    for metric in vars(metrics).values():
        # A release is one of few: what goes on without end is a model's version.
        allowed = {"version"} if process is BuildMetrics else set()
        assert not FORBIDDEN_LABELS & set(metric._labelnames) - allowed


def test_processes_do_not_share_a_name() -> None:
    registry = CollectorRegistry()
    for process in (*PROCESSES, *OF_EACH_PROCESS):
        process(registry)  # raises on a duplicate
    assert {"springtide_serving_weight_freshness_seconds", "springtide_serving_feature_freshness_seconds"} <= names()


def test_metrics_are_offered_until_stopped() -> None:
    registry = CollectorRegistry()
    StreamMetrics(registry).dead_letters.labels("undecodable").inc(3)
    port = free_port()
    stop = serve(registry, port)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    finally:
        stop()
    assert 'springtide_stream_dead_letters_total{reason="undecodable"} 3.0' in text
    assert f'python="{platform.python_version()}"' in text
    assert f'kafka="{metadata.version("kafka-python")}"' in text
    offered = {line.split()[0] for line in text.splitlines()}
    assert set(OF_ANY_PROCESS) <= offered
    assert set(OF_ANY_PROCESS) <= names()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()


def test_a_taken_port_is_one_clear_error() -> None:
    with socket.socket() as owner:
        owner.bind(("127.0.0.1", 0))
        owner.listen()
        with pytest.raises(PortTaken, match="metrics_port"):
            serve(CollectorRegistry(), owner.getsockname()[1])
