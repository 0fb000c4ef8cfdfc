"""Connections to a broker: unreachable, secured, and with tokens of one's own."""

from __future__ import annotations

import base64
import json
import os
import selectors
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploy import local_kafka as java
from deploy.java_jars import KAFKA
from deploy.local_kafka import properties
from state.config.sections import Kafka
from state.errors import LogError, UnreachableBroker
from state.log import Reader, Topics, Writer, client_options
from state.log.client import ClientSelector
from state.process.network import HOST, free_port, listens
from tests.one_kafka import Running, broker_like

LEFT_SOCKETS = pytest.mark.filterwarnings("ignore:unclosed <s:ResourceWarning")


@LEFT_SOCKETS
@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("listens", [False, True], ids=["nobody listens", "no broker listens"])
def test_an_unreachable_broker_is_one_clear_line_in_time(settings: Kafka, listens: bool) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        if listens:
            deaf.listen()
        lost = replace(settings, bootstrap_servers=f"127.0.0.1:{deaf.getsockname()[1]}", request_timeout_s=1.0)
        for use in (
            lambda: Topics(lost),
            lambda: Reader(lost, "clicks"),
            lambda: Writer(lost),
            lambda: Writer(lost, "t"),
        ):
            start = time.monotonic()
            with pytest.raises(UnreachableBroker, match=r"127.0.0.1:\d+.*kafka.bootstrap_servers") as raised:
                use()
            assert time.monotonic() - start < 30
            assert "\n" not in str(raised.value)


@LEFT_SOCKETS
@pytest.mark.usefixtures("refused")
def test_security_settings_reach_the_client(settings: Kafka, tmp_path: Path) -> None:
    secure = replace(
        settings,
        security_protocol="SASL_SSL",
        sasl_mechanism="SCRAM-SHA-512",
        sasl_username="ada",
        sasl_password="secret",
        ssl_cafile="ca.pem",
        ssl_certfile="me.pem",
        ssl_keyfile="me.key",
        ssl_key_password="pass",
    )
    options = client_options(secure)
    assert {name: options[name] for name in options if name.startswith(("sasl", "ssl", "security"))} == {
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_plain_username": "ada",
        "sasl_plain_password": "secret",
        "ssl_cafile": "ca.pem",
        "ssl_certfile": "me.pem",
        "ssl_keyfile": "me.key",
        "ssl_password": "pass",
    }
    absent = replace(settings, request_timeout_s=1.0, security_protocol="SSL", ssl_cafile=str(tmp_path / "absent.pem"))
    with pytest.raises(LogError, match=r"kafka\.ssl_") as raised:
        Topics(absent)
    assert "secret" not in str(raised.value)


@LEFT_SOCKETS
@pytest.mark.usefixtures("refused")
def test_the_wrong_protocol_is_told_in_one_line(settings: Kafka) -> None:
    # The local broker speaks no TLS and no SASL.
    protocols: tuple[dict[str, Any], ...] = (
        {"security_protocol": "SSL"},
        {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "PLAIN", "sasl_username": "a", "sasl_password": "b"},
    )
    for changes in protocols:
        with pytest.raises(LogError, match=r"kafka\.security_protocol") as raised:
            Topics(replace(settings, request_timeout_s=1.0, **changes))
        assert "\n" not in str(raised.value)


def test_the_selector_knows_the_keys_that_the_standard_one_knows() -> None:
    ours, theirs = ClientSelector(), selectors.DefaultSelector()
    one, other = socket.socketpair()
    with ours, theirs, one, other:
        for selector in (ours, theirs):
            with pytest.raises(KeyError):
                selector.get_key(one)
            selector.register(one, selectors.EVENT_READ, "reads")
        assert ours.get_key(one) == theirs.get_key(one) == ours.get_key(one.fileno())
        for selector in (ours, theirs):
            selector.modify(one, selectors.EVENT_WRITE, "writes")
        assert ours.get_key(one) == theirs.get_key(one) and ours.get_key(one).data == "writes"
        ours.unregister(one)
        with pytest.raises(KeyError):
            ours.get_key(one)
        ours.register(other, selectors.EVENT_READ)
        other.close()
        assert ours.get_key(other).fileobj is other


START_S = 90.0
LISTENER = """
listeners=PLAINTEXT://{host}:{plain},CONTROLLER://{host}:{controller},SASL_PLAINTEXT://{host}:{port}
advertised.listeners=PLAINTEXT://{host}:{plain},SASL_PLAINTEXT://{host}:{port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT
sasl.enabled.mechanisms=OAUTHBEARER
listener.name.sasl_plaintext.oauthbearer.sasl.jaas.config=\
 org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule required unsecuredLoginStringClaim_sub="broker";
"""


def part(claims: object) -> str:
    """One part of a token."""
    return base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")


def good_token() -> str:
    """A token that Kafka's validator of unsigned tokens takes."""
    now_s = time.time()
    return f"{part({'alg': 'none'})}.{part({'sub': 'ada', 'iat': now_s, 'exp': now_s + 600})}."


def old_token() -> str:
    """One that is over."""
    return f"{part({'alg': 'none'})}.{part({'sub': 'ada', 'iat': 1, 'exp': 2})}."


def no_token() -> str:
    """What a provider does whose identity server is away."""
    raise ConnectionError("the identity server is away")


@pytest.fixture(scope="module")
def secured(kafka: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    """How to connect to a broker that asks for a token."""
    folder = broker_like(kafka, tmp_path_factory.mktemp("oauth")).directory
    port, plain, controller = free_port(), free_port(), free_port()
    configuration, log = folder / "server.properties", folder / "server.log"
    fixed = properties(plain, controller, folder / "data", 1)
    # The later of two lines counts.
    configuration.write_text(fixed + LISTENER.format(host=HOST, port=port, plain=plain, controller=controller))
    class_path = os.pathsep.join(map(str, KAFKA.jars()))
    words = java.command(class_path, log, "-Xmx256m", "kafka.Kafka", str(configuration))
    broker = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_S
        while not (listens(port) and "Kafka Server started" in log.read_text()):
            assert broker.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.1)
        yield Kafka(
            bootstrap_servers=f"{HOST}:{port}",
            security_protocol="SASL_PLAINTEXT",
            sasl_mechanism="OAUTHBEARER",
            sasl_token_provider=f"{__name__}:good_token",
            request_timeout_s=20.0,
        )
    finally:
        broker.kill()
        broker.wait()


def test_the_token_of_ones_own_function_opens_the_broker(secured: Kafka) -> None:
    with Topics(secured) as topics:
        topics.ensure("clicks", 1)
        assert topics.names() == ["clicks"]


@pytest.mark.parametrize(
    ("provider", "message"),
    [("old_token", r"kafka\.sasl_\*"), ("no_token", "no_token failed: ConnectionError: the identity server is away")],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("refused")
def test_without_a_good_token_it_stays_shut_in_one_line(secured: Kafka, provider: str, message: str) -> None:
    shut = replace(secured, sasl_token_provider=f"{__name__}:{provider}", request_timeout_s=3.0)
    with pytest.raises(LogError, match=message) as raised:
        Topics(shut)
    assert "\n" not in str(raised.value)
