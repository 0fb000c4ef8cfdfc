"""Each pair of pods that must communicate may, by the network policies of both ends, and others may not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from urllib.parse import urlsplit

import pytest

from deploy.watch import scrape
from state.config.sections import SegmentSettings
from state.config.settings import Settings
from tests.manifests import KUBECTL, PAGE, WHY_NOT, Document, Peer, boxes, built, connects, of_kind, selects

pytestmark = pytest.mark.skipif(KUBECTL is None, reason=WHY_NOT)
EVERY = ("small", "large", "full", "flink", "shared", "standby", "halves", "workers")
COMPONENT = "app.kubernetes.io/component"
LABELS = {"app.kubernetes.io/name": "springtide"}
OUTSIDE = None
"""A broker or an object store, at an address of no pod here."""
# Pods of a Flink of the user's, with the labels that the README asks for.
FLINK = {name: Peer(LABELS | {COMPONENT: name}) for name in ("stream-worker", "stream-manager", "stream-jobs")}
WORKERS = 7070
"""The port of `trainer.worker_addresses`."""
ANY_PORT = 45123
"""One that the system chose, as Flink's TaskManagers ask it to."""
Pair = tuple[str, Peer | None, Peer | None, int]


def settings_of(overlay: str) -> Settings:
    found = built(f"overlays/{overlay}")
    (sizes,) = (one["data"] for one in of_kind(found, "ConfigMap") if one["metadata"]["name"] == "springtide-sizes")
    return next(box for box in boxes(found) if box.name == "console").settings(sizes)


def pods(found: Sequence[Document]) -> dict[str, Peer]:
    return {box.owner: Peer(box.labels) for box in boxes(found)}


def behind(found: Sequence[Document], service: str, everybody: Mapping[str, Peer]) -> Iterator[tuple[str, Peer]]:
    """The pods that a service leads to."""
    (selector,) = (one["spec"]["selector"] for one in of_kind(found, "Service") if one["metadata"]["name"] == service)
    leading = [(name, pod) for name, pod in everybody.items() if selects({"matchLabels": selector}, pod.labels)]
    assert leading, service
    yield from leading


def required(overlay: str) -> Iterator[Pair]:
    """Name, client, server and port of each connection that a deployment makes."""
    found, settings = built(f"overlays/{overlay}"), settings_of(overlay)
    ours = pods(found)
    everybody = ours | (FLINK if overlay == "flink" else {})
    broker = int(settings.kafka.bootstrap_servers.rpartition(":")[2])
    asking_kafka = {
        box.owner
        for box in boxes(found)
        if any(one["name"] == "SPRINGTIDE_KAFKA_SASL_USERNAME" for one in box.told["env"])
    }
    for name in {*asking_kafka, *(["stream-worker"] if overlay == "flink" else [])}:
        yield f"{name} to Kafka", everybody[name], OUTSIDE, broker
    if overlay == "shared":
        for name in {
            box.owner for box in boxes(found) if box.labels[COMPONENT] in ("trainer", "stream", "serving", "console")
        }:
            yield f"{name} to the object store", ours[name], OUTSIDE, 443
    watched = scrape.watched_urls(
        replace(settings, segments=SegmentSettings(("all=1 > 0",))) if overlay == "full" else settings
    )
    for part in watched.keys() - {"up"}:
        url = urlsplit(watched[part])
        for name, pod in behind(found, str(url.hostname), everybody):
            yield f"console to {part} ({name})", ours["Deployment springtide-console"], pod, int(url.port or 0)
    prometheus = Peer({}, {"springtide/metrics": "true"})
    services = of_kind(found, "Service")
    for monitor in of_kind(found, "ServiceMonitor"):
        port = monitor["spec"]["endpoints"][0]["port"]
        for service in services:
            if selects(monitor["spec"]["selector"], service["metadata"].get("labels", {})):
                number = next((one["port"] for one in service["spec"]["ports"] if one["name"] == port), None)
                if number is not None:
                    for name, pod in behind(found, service["metadata"]["name"], everybody):
                        yield f"Prometheus to {name}:{number}", prometheus, pod, number
    if overlay == "halves":
        hosts = [(name, pod) for name, pod in ours.items() if pod.labels.get(COMPONENT) == "serving"]
        for name, pod in hosts:
            for other, server in hosts:
                yield f"{name} to {other}", pod, server, settings.serving.port
    if overlay == "workers":
        group = {
            name: ours[name] for name in ("Deployment springtide-trainer", "StatefulSet springtide-trainer-worker")
        }
        for name, pod in group.items():
            for other, server in group.items():
                yield f"{name} to {other}", pod, server, WORKERS
    client = Peer({}, {"springtide/clients": "true"})
    for name, pod in ours.items():
        if pod.labels.get(COMPONENT) == "serving":
            for number in (settings.serving.port, settings.serving.grpc_port):
                yield f"a client to {name}:{number}", client, pod, number
    ingress = Peer({}, {"springtide/console": "true"})
    yield "a browser to the page", ingress, ours["Deployment springtide-console"], settings.console.port
    if overlay == "flink":
        submit = ours["CronJob springtide-stream-submit"]
        yield "submit to the job server", submit, FLINK["stream-jobs"], settings.flink.job_port
        yield "submit to its artifacts", submit, FLINK["stream-jobs"], 8097
        yield "submit to the JobManager", submit, FLINK["stream-manager"], settings.flink.rest_port
        yield "job server to the JobManager", FLINK["stream-jobs"], FLINK["stream-manager"], settings.flink.rest_port
        for pair in (("stream-worker", "stream-manager"), ("stream-manager", "stream-worker"), ("stream-worker",) * 2):
            yield " to ".join(pair), FLINK[pair[0]], FLINK[pair[1]], ANY_PORT


@pytest.mark.parametrize("overlay", EVERY)
def test_pods_that_must_communicate_may(overlay: str) -> None:
    policies = of_kind(built(f"overlays/{overlay}"), "NetworkPolicy")
    pairs = list(required(overlay))
    assert len(pairs) > 10
    closed = [name for name, client, server, port in pairs if not connects(policies, client, server, port)]
    assert closed == []


@pytest.mark.parametrize("overlay", EVERY)
def test_others_may_not(overlay: str) -> None:
    found = built(f"overlays/{overlay}")
    policies, settings, ours = of_kind(found, "NetworkPolicy"), settings_of(overlay), pods(found)
    stranger, scraper = Peer({}, {}), Peer({}, {"springtide/metrics": "true"})
    ports = {port for box in boxes(found) for port in box.ports.values()}
    everybody = ours | (FLINK if overlay == "flink" else {})
    for name, pod in everybody.items():
        open_to_anybody = [
            port for port in {*ports, settings.flink.rest_port} if connects(policies, stranger, pod, port)
        ]
        assert open_to_anybody == [], name
        assert not connects(policies, pod, OUTSIDE, 25), name
    console = ours["Deployment springtide-console"]
    assert not connects(policies, scraper, console, settings.console.port)
    serving = ours["StatefulSet springtide-serving"]
    assert not connects(policies, serving, ours["Deployment springtide-trainer"], settings.trainer.metrics_port)
    if overlay == "workers":
        assert not connects(policies, serving, ours["StatefulSet springtide-trainer-worker"], WORKERS)
    if overlay == "flink":
        assert not connects(policies, serving, FLINK["stream-manager"], settings.flink.rest_port)


def test_the_readme_names_the_labels_of_flinks_pods() -> None:
    text = PAGE.read_text()
    assert all(f"`{name}`" in text for name in FLINK)
