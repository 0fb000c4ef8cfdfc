"""The broker that `up` starts, and its jars."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from deploy import local_kafka as broker_module
from deploy.java_jars import KAFKA, Product, locked
from deploy.local_kafka import Broker
from state.errors import KafkaFailed, PortTaken
from state.process.network import free_port
from tests.one_kafka import Running
from tests.reading import eventually


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_running_broker_listens_on_loopback_alone(kafka: Running) -> None:
    with socket.create_connection(("127.0.0.1", kafka.port), timeout=5):
        pass
    assert "Kafka Server started" in kafka.log_path.read_text()


def test_a_taken_port_is_named_with_its_setting(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortTaken, match=rf"port {port} is in use.*kafka\.port"):
            Broker(tmp_path, port).start()


def test_a_second_broker_on_a_directory_says_who_holds_it(kafka: Running) -> None:
    with pytest.raises(KafkaFailed, match=r"another broker uses this directory"):
        Broker(kafka.directory, free_port(), heap_mb=128).start()
    with socket.create_connection(("127.0.0.1", kafka.port), timeout=5):
        pass
    assert f":{kafka.port}" in (kafka.directory / "server.properties").read_text()


def test_a_broker_that_ends_while_starting_is_quoted(tmp_path: Path) -> None:
    broker = Broker(tmp_path, free_port(), heap_mb=1)
    with pytest.raises(KafkaFailed, match=r"ended with status 1.*(heap|memory)") as raised:
        broker.start()
    assert "\n" not in str(raised.value)
    assert broker.pid is None


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=5 * 2**20)
    monkeypatch.setattr("deploy.local_kafka.shutil.disk_usage", lambda _: usage)
    with pytest.raises(KafkaFailed, match=r"5 MB free.*paths.state"):
        Broker(tmp_path, free_port()).start()
    assert list(tmp_path.iterdir()) == []


def test_the_cache_that_the_installation_writes_fits_java_and_the_jars() -> None:
    assert broker_module.main([]) == 0
    cache = broker_module.start_cache()
    words = ("-XX:AOTMode=on", "-XX:+UseSerialGC", "kafka.tools.StorageTool", "random-uuid")
    command = broker_module.command(os.pathsep.join(map(str, KAFKA.jars())), Path(os.devnull), *words)
    assert f"-XX:AOTCache={cache}" in command
    # In this mode Java ends if it cannot use the cache.
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    cut = [f"-XX:AOTCache={__file__}" if word.startswith("-XX:AOTCache=") else word for word in command]
    assert subprocess.run(cut, capture_output=True).returncode != 0


def test_a_broker_starts_where_the_cache_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert broker_module.main([]) == 0
    content = broker_module.start_cache().read_bytes()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = broker_module.start_cache()
    cache.parent.mkdir()
    cache.write_bytes(content[: len(content) // 2])
    with Broker(tmp_path / "kafka", free_port(), heap_mb=192) as broker:
        assert broker.pid is not None


CHILD = """
import sys
from deploy.local_kafka import Broker
broker = Broker(sys.argv[1], int(sys.argv[2]), heap_mb=192).start()
print(broker.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="the death signal of a parent is Linux's")
def test_a_broker_dies_with_its_parent(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "kafka"), str(free_port())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert runs(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert eventually(lambda: not runs(pid))
    parent.communicate()


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
