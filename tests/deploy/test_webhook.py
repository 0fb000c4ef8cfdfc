"""Alertmanager's own JSON, sent over HTTP, pins to a version from before the alert: once, with a token, and over no operator's decision."""

from __future__ import annotations

import copy
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from deploy import webhook
from deploy.formats import iso
from deploy.serving.requests.server import listen
from state.config.loading import load
from state.config.settings import Settings
from state.process.network import free_port
from state.registry import control as transitions
from tests.deploy.operating import NOW_MS, Operator, draft, files
from tests.e2e.running import until

# As https://prometheus.io/docs/alerting/latest/configuration/#webhook_config and its notifier write it.
NOTIFICATION: dict[str, Any] = {
    "version": "4",
    "groupKey": '{}:{alertname="SpringtideCalibrationOff"}',
    "truncatedAlerts": 0,
    "status": "firing",
    "receiver": "springtide-pin",
    "groupLabels": {"alertname": "SpringtideCalibrationOff"},
    "commonLabels": {"alertname": "SpringtideCalibrationOff", "severity": "critical"},
    "commonAnnotations": {"summary": "Probabilities are 40 % too high."},
    "externalURL": "http://alertmanager:9093",
    "alerts": [
        {
            "status": "firing",
            "labels": {"alertname": "SpringtideCalibrationOff", "severity": "critical"},
            "annotations": {"summary": "Probabilities are 40 % too high."},
            "startsAt": iso(NOW_MS - 390_000),  # a minute and a half after version 2
            "endsAt": "0001-01-01T00:00:00Z",
            "generatorURL": "http://prometheus:9090/graph?g0.expr=up",
            "fingerprint": "3dd75e5e8db6a2d6",
        }
    ],
}


@pytest.fixture
def operator(tmp_path: Path) -> Operator:
    """Versions 1 to 4, of nine, eight, seven and six minutes ago."""
    made = Operator(tmp_path)
    registry = made.registry
    registry.propose(transitions.start(actor="trainer", reason="first start", now_ms=NOW_MS - 400_000))
    for number in range(1, 5):
        registry.publish(draft(number, number - 1 or None), files())
    return made


@pytest.fixture
def settings(operator: Operator) -> Settings:
    return load(["--paths.state", str(operator.state), "--up.metrics_port", str(free_port() - 3)], env={})


@pytest.fixture
def url(settings: Settings) -> Iterator[str]:
    bound, server = listen("127.0.0.1", settings.up.webhook_port), webhook.server_of(settings, lambda: NOW_MS)
    thread = Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    until(lambda: server.started, "the webhook does not start")
    yield f"http://127.0.0.1:{settings.up.webhook_port}{webhook.PATH}"
    server.should_exit = True
    thread.join()


def send(url: str, body: bytes, token: str | None, method: str = "POST") -> tuple[int, dict[str, str]]:
    headers = {"content-type": "application/json"} | ({} if token is None else {"authorization": f"Bearer {token}"})
    request = urllib.request.Request(url, body or None, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as refused:
        return refused.code, json.loads(refused.read() or b"{}")


def token_of(settings: Settings, role: str = "operate") -> str:
    return (settings.tokens_dir / role).read_text().strip()


def notification(**changes: Any) -> bytes:
    """The notification, with changes of its alert."""
    document = copy.deepcopy(NOTIFICATION)
    document["alerts"][0] |= changes
    return json.dumps(document).encode()


def generations(operator: Operator) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(operator("history", "-o", "json"))
    return found


def test_a_firing_alert_pins_to_the_newest_version_from_before_it_and_history_names_it(
    operator: Operator, settings: Settings, url: str
) -> None:
    status, said = send(url, notification(), token_of(settings))
    assert (status, said["done"].startswith("answers stay at version 2 ")) == (200, True), said
    control = operator.registry.control()
    assert control is not None and (control.serving.mode, control.serving.version) == ("pin", 2)
    newest = max(generations(operator), key=lambda one: one["generation"])
    assert (newest["action"], newest["actor"]) == ("pin", "alertmanager: SpringtideCalibrationOff")
    assert newest["reason"] == "Probabilities are 40 % too high."


def test_the_same_notification_again_and_a_resolved_one_change_nothing(
    operator: Operator, settings: Settings, url: str
) -> None:
    for body in (notification(), notification(), notification(status="resolved", endsAt=iso(NOW_MS))):
        assert send(url, body, token_of(settings))[0] == 200
    assert [one["action"] for one in generations(operator)].count("pin") == 1
    assert len(generations(operator)) == 2


def test_what_an_operator_pinned_stays(operator: Operator, settings: Settings, url: str) -> None:
    operator("pin", "4", "--reason", "I know")
    status, said = send(url, notification(), token_of(settings))
    assert status == 200 and "version 4 already" in said["done"]
    control = operator.registry.control()
    assert control is not None and control.serving.version == 4


@pytest.mark.parametrize(("role", "status"), [(None, 401), ("wrong", 401), ("read", 403)])
def test_without_the_operators_token_nothing_happens(
    operator: Operator, settings: Settings, url: str, role: str | None, status: int
) -> None:
    token = "not a token of this host" if role == "wrong" else role and token_of(settings, role)
    assert send(url, notification(), token)[0] == status
    assert len(generations(operator)) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'{"version": "3", "alerts": []}',
        b'{"version": "4", "alerts": []}',
        b'{"version": "4", "alerts": [7]}',
        notification(status="perhaps"),
        notification(startsAt="soon"),
        notification(labels={"alertname": "two\nlines"}),
        notification(labels={}),
    ],
)
def test_what_is_no_notification_is_refused_and_changes_nothing(
    operator: Operator, settings: Settings, url: str, body: bytes
) -> None:
    status, said = send(url, body, token_of(settings))
    assert status == 400 and said["error"]
    assert len(generations(operator)) == 1


def test_nothing_but_a_post_at_its_place_changes_something(operator: Operator, settings: Settings, url: str) -> None:
    token = token_of(settings)
    assert send(url, b"", token, "GET")[0] == 405
    assert send(url, notification(), token, "PUT")[0] == 405
    assert send(f"{url}/more", notification(), token)[0] == 404
    assert len(generations(operator)) == 1


def test_a_body_without_end_is_refused_before_it_comes(operator: Operator, settings: Settings, url: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", settings.up.webhook_port, timeout=10)
    headers = {"content-length": str(webhook.MOST_BYTES + 1), "authorization": f"Bearer {token_of(settings)}"}
    connection.request("POST", webhook.PATH, headers=headers)
    assert connection.getresponse().status == 413
    connection.close()


def test_an_alert_older_than_every_version_is_told_so(operator: Operator, settings: Settings, url: str) -> None:
    status, said = send(url, notification(startsAt=iso(NOW_MS - 3_600_000)), token_of(settings))
    assert status >= 400 and "no version of the serving branch was made before" in said["error"]
    assert len(generations(operator)) == 1
