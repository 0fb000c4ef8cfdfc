"""The broker's jars: exactly those of the lock file, each with its digest, and nothing else is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.kafka import jars
from state.errors import KafkaFailed

NAME = "org.example:one:1.0"


def fetch(path: Path) -> Callable[[str], Path]:
    """A repository that has one jar."""
    return lambda name: path


def test_every_jar_of_the_broker_is_there_and_is_the_one_that_was_tested() -> None:
    found = {path.name for path in jars.resolve()}
    assert found == {"-".join(name.split(":")[1:]) + ".jar" for name in jars.locked()}
    assert any(name.startswith("log4j-slf4j-impl-") for name in found)
    (version,) = {name.rpartition(":")[2] for name in jars.locked() if name.startswith("org.apache.kafka:")}
    assert f"kafka-clients-{version}.jar" in found


def test_no_java_is_asked_and_none_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    from jgo.util.java import JavaLocator

    monkeypatch.setattr(JavaLocator, "locate", lambda *_, **__: pytest.fail("jgo looks for a Java"))
    assert jars.resolve()


def test_a_jar_with_another_digest_is_not_run(tmp_path: Path) -> None:
    jar = tmp_path / "one-1.0.jar"
    jar.write_bytes(b"the jar that was tested")
    wanted = {NAME: hashlib.sha256(jar.read_bytes()).hexdigest()}
    assert jars.resolve(wanted, fetch(jar)) == [jar]
    jar.write_bytes(b"the jar that was testee")
    with pytest.raises(KafkaFailed, match=r"one-1\.0\.jar is not the org\.example:one:1\.0.*remove the file"):
        jars.resolve(wanted, fetch(jar))


def test_a_jar_that_cannot_be_had_gives_one_line() -> None:
    def offline(name: str) -> Path:
        raise OSError("no route to host\nmore about it")

    with pytest.raises(KafkaFailed, match=r"Maven Central.*no route to host.*bootstrap_servers") as e:
        jars.resolve({NAME: ""}, offline)
    assert "\n" not in str(e.value)
