"""OAUTHBEARER: a token of the user's own function opens a real broker, and none or a wrong one does not."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from deploy.kafka import broker as java
from deploy.kafka.configuration import HOST, free_port, listens, properties
from deploy.kafka.jars import KAFKA
from state.config.sections import Kafka
from state.errors import LogError
from state.log import Topics

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
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    """How to connect to a broker that asks for a token."""
    folder = tmp_path_factory.mktemp("oauth")
    port, plain, controller = free_port(), free_port(), free_port()
    configuration, log = folder / "server.properties", folder / "server.log"
    fixed = properties(plain, controller, folder / "data", 1)
    # The later of two lines counts.
    configuration.write_text(fixed + LISTENER.format(host=HOST, port=port, plain=plain, controller=controller))
    class_path = os.pathsep.join(map(str, KAFKA.jars()))
    java.format_storage(class_path, log, configuration)
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
def test_without_a_good_token_it_stays_shut_in_one_line(secured: Kafka, provider: str, message: str) -> None:
    shut = replace(secured, sasl_token_provider=f"{__name__}:{provider}", request_timeout_s=3.0)
    with pytest.raises(LogError, match=message) as raised:
        Topics(shut)
    assert "\n" not in str(raised.value)
