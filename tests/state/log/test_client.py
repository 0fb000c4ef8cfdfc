"""Connecting: settings reach the client, and what fails is one clear line in time."""

from __future__ import annotations

import selectors
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from state.config.sections import Kafka
from state.errors import LogError, UnreachableBroker
from state.log import Reader, Topics, Writer, client_options
from state.log.client import ClientSelector

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
    for changes in (
        {"security_protocol": "SSL"},
        {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "PLAIN", "sasl_username": "a", "sasl_password": "b"},
    ):
        with pytest.raises(LogError, match=r"kafka\.security_protocol") as raised:
            Topics(replace(settings, request_timeout_s=1.0, **changes))  # type: ignore[arg-type]
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
