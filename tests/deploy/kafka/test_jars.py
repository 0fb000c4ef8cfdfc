"""The jars of the broker: exactly those of the lock file, each with its digest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.java_jars import Product, locked
from deploy.kafka.jars import KAFKA
from state.errors import KafkaFailed

NAME = "org.example:one:1.0"


def fetch(path: Path) -> Callable[[str], Path]:
    """A repository that has one jar."""
    return lambda name: path


def one_jar(lock: Path, digest: str) -> Product:
    lock.write_text(f"{NAME} {digest}\n")
    return replace(KAFKA, lock=lock)


def test_the_broker_has_all_jars_of_its_lock_file_and_no_java_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    from jgo.util.java import JavaLocator

    monkeypatch.setattr(JavaLocator, "locate", lambda *_, **__: pytest.fail("jgo looks for a Java"))
    names = locked(KAFKA.lock)
    found = {path.name for path in KAFKA.jars()}
    assert found == {"-".join(name.split(":")[1:]) + ".jar" for name in names}
    assert any(name.startswith("log4j-slf4j-impl-") for name in found)
    (version,) = {name.rpartition(":")[2] for name in names if name.startswith("org.apache.kafka:")}
    assert f"kafka-clients-{version}.jar" in found


def test_a_jar_with_another_digest_is_not_run(tmp_path: Path) -> None:
    jar = tmp_path / "one-1.0.jar"
    jar.write_bytes(b"the jar that was tested")
    product = one_jar(tmp_path / "jars.lock", hashlib.sha256(jar.read_bytes()).hexdigest())
    assert product.jars(fetch(jar)) == [jar]
    jar.write_bytes(b"the jar that was testee")
    with pytest.raises(KafkaFailed, match=r"one-1\.0\.jar is not the org\.example:one:1\.0.*remove the file"):
        product.jars(fetch(jar))


def test_the_error_of_a_jar_that_cannot_be_fetched_is_one_line(tmp_path: Path) -> None:
    def offline(name: str) -> Path:
        raise OSError("no route to host\nmore about it")

    with pytest.raises(KafkaFailed, match=r"Maven Central.*no route to host.*bootstrap_servers") as e:
        one_jar(tmp_path / "jars.lock", "0").jars(offline)
    assert "\n" not in str(e.value)
