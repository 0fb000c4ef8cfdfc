"""The containers of `deploy/kubernetes` run as they stand: their commands and variables, not as root, on a root file system that is read-only.

There is no container engine here. A user and a mount namespace are what an engine
makes of those three: what the manifests mount to be written into is written into,
and nothing else can be.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from state.log import Topics
from state.process.network import free_ports
from tests.conftest import KafkaFactory
from tests.e2e.running import until
from tests.manifests import BASE, ROOT, Box, boxes, documents, sizes_of

USER = 10001
NAMESPACES = ["unshare", "--user", "--map-root-user", "--mount", "--"]
NOT_ROOT = ["unshare", "--user", f"--map-user={USER}", f"--map-group={USER}", "--"]
# 1. One folder may be written into, and in it one lies in memory; all else is read-only.
# 2. Each container is a script of its own, run by somebody who is not root and may not become it; init containers first.
SANDBOX = f"""
set -eu
folder=$1
mount --bind "$folder" "$folder"
mount -o remount,bind,ro /
mount -t tmpfs -o mode=0700 memory "$folder/memory"
run() {{
    name=${{1##*/}}
    {shlex.join(NOT_ROOT)} sh "$1" > "$folder/log/$name" 2>&1 && code=0 || code=$?
    echo $code > "$folder/ended/$name"
}}
for script in "$folder"/first/*; do run "$script"; done
for script in "$folder"/run/*; do run "$script" & done
wait
"""
FIRST = [one for one in boxes(documents(BASE)) if one.is_first]
LASTING = [one for one in boxes(documents(BASE)) if "livenessProbe" in one.told]
# Where the manifests mount it -> below the folder; the longer first.
PLACES = {
    "/var/lib/springtide-registry": "registry",
    "/var/lib/springtide": "state",
    "/etc/springtide": "etc",
    "/memory": "memory",
}


def can_sandbox() -> bool:
    """Whether this system lets us make namespaces."""
    if not sys.platform.startswith("linux") or shutil.which("unshare") is None:
        return False
    tried = subprocess.run([*NAMESPACES, "sh", "-c", f"mount -t tmpfs none /mnt && {shlex.join(NOT_ROOT)} true"])
    return tried.returncode == 0


@dataclass
class Pods:
    """All containers of the base but its jobs, running.

    Attributes:
        folder: What they may write into.
        ports: Container -> name of a port -> its number here.
    """

    folder: Path
    ports: Mapping[str, Mapping[str, int]]

    def get(self, box: Box, probe: str) -> int | None:
        """The status that a probe gets; None where nobody answers."""
        asked = box.told[probe]["httpGet"]
        with suppress(httpx.TransportError):
            # As from another machine: whoever listens on the loopback's first address alone does not answer here.
            return httpx.get(f"http://127.0.0.2:{self.ports[box.name][asked['port']]}{asked['path']}").status_code
        return None

    def log(self, name: str) -> str:
        return (self.folder / "log" / name).read_text()

    def pid(self, name: str) -> int:
        return int((self.folder / "pid" / name).read_text())

    def catches(self, name: str, number: int) -> bool:
        """Whether a container has a handler for a signal."""
        caught = next(line for line in self.status(name).splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (number - 1) & 1)

    def status(self, name: str) -> str:
        """What the kernel says of it."""
        return Path(f"/proc/{self.pid(name)}/status").read_text()

    def ended(self, name: str) -> int | None:
        """The exit code of a container that ended."""
        file = self.folder / "ended" / name
        return int(file.read_text() or -1) if file.exists() else None


def placed(text: str, folder: Path) -> str:
    """A text with the manifests' places below `folder`."""
    for place, below in PLACES.items():
        text = text.replace(place, str(folder / below))
    return text


def variables(box: Box, folder: Path, here: Mapping[str, str]) -> dict[str, str]:
    """What a container finds in its environment: as in the manifests and the image, but for places, ports and Kafka."""
    image = {"HOME": folder / "tmp", "TMPDIR": folder / "tmp", "NUMBA_CACHE_DIR": folder / "cache"}
    found = {name: str(value) for name, value in image.items()} | sizes_of(BASE / "kustomization.yaml")
    found |= {one["name"]: placed(one["value"], folder) for one in box.told["env"] if "value" in one}
    if box.name == "console":
        # No name service here.
        found["SPRINGTIDE_SERVING_HOST"] = "localhost"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**found, **here, "PYTHONPATH": str(ROOT), "PATH": path}


@pytest.fixture
def pods(tmp_path: Path, kafka_settings: KafkaFactory) -> Iterator[Pods]:
    kafka = kafka_settings()
    with Topics(kafka) as topics:
        topics.ensure(kafka.clicks_topic, 2)
    for name in ("first", "run", "log", "pid", "ended", "tmp", "cache", "state", "registry", "memory"):
        (tmp_path / name).mkdir()
    for name, text in (("salt/salt", "ab" * 32), ("tokens/read", "r" * 32), ("tokens/operate", "o" * 32)):
        file = tmp_path / "etc" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o400)
    (tmp_path / "etc" / "config").mkdir()
    settings = placed((BASE / "springtide.toml").read_text(), tmp_path)
    (tmp_path / "etc" / "config" / "springtide.toml").write_text(settings)
    free = free_ports(f"{box.name} {name}" for box in LASTING for name in box.ports)
    ports = {box.name: {name: free[f"{box.name} {name}"] for name in box.ports} for box in LASTING}
    here = {
        "SPRINGTIDE_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
        "SPRINGTIDE_KAFKA_CLICKS_TOPIC": kafka.clicks_topic,
        "SPRINGTIDE_KAFKA_DEAD_LETTERS_TOPIC": kafka.dead_letters_topic,
        "SPRINGTIDE_KAFKA_MICROBATCHES_TOPIC": kafka.microbatches_topic,
        "SPRINGTIDE_KAFKA_GROUP": kafka.group,
        "SPRINGTIDE_KAFKA_REPLICATION": "1",
        "SPRINGTIDE_KAFKA_MIN_INSYNC_REPLICAS": "1",
        "SPRINGTIDE_METRICS_HOSTS": "",
        "SPRINGTIDE_STREAM_METRICS_PORT": str(ports["stream"]["metrics"]),
        "SPRINGTIDE_TRAINER_METRICS_PORT": str(ports["trainer"]["metrics"]),
        "SPRINGTIDE_SERVING_METRICS_PORT": str(ports["applier"]["metrics"]),
        "SPRINGTIDE_UP_METRICS_PORT": str(ports["validation"]["metrics"] - 2),
        "SPRINGTIDE_SERVING_PORT": str(ports["worker"]["http"]),
        "SPRINGTIDE_SERVING_GRPC_PORT": str(ports["worker"]["grpc"]),
        "SPRINGTIDE_SERVING_DRAIN_S": "0.1",
        "SPRINGTIDE_CONSOLE_PORT": str(ports["console"]["http"]),
    }
    for box in (*FIRST, *LASTING):
        told = variables(box, tmp_path, here)
        lines = [
            f"echo $$ > {shlex.quote(str(tmp_path / 'pid' / box.name))}",
            f"cd {shlex.quote(str(tmp_path / 'tmp'))}",
        ]
        lines.append(
            f"exec env -i {shlex.join(f'{name}={value}' for name, value in told.items())} {shlex.join(box.told['command'])}"
        )
        (tmp_path / ("first" if box.is_first else "run") / box.name).write_text("\n".join(lines) + "\n")
    running = Pods(tmp_path, ports)
    shell = subprocess.Popen([*NAMESPACES, "sh", "-c", SANDBOX, "sandbox", str(tmp_path)])
    try:
        yield running
    finally:
        for file in (tmp_path / "pid").iterdir():
            if running.ended(file.name) is None:
                with suppress(ProcessLookupError, ValueError):
                    os.kill(int(file.read_text()), signal.SIGKILL)
        shell.wait(30)


@pytest.mark.nightly
@pytest.mark.skipif(not can_sandbox(), reason="this system lets nobody make a user and a mount namespace")
def test_every_container_comes_up_without_root_on_a_read_only_tree_and_ends_when_asked(pods: Pods) -> None:
    def all_up() -> bool:
        for box in LASTING:
            assert pods.ended(box.name) is None, pods.log(box.name)
        return all(pods.get(box, "livenessProbe") == 200 for box in LASTING)

    until(all_up, lambda: "\n".join(f"{box.name}: {pods.log(box.name)[-2000:]}" for box in LASTING), 300.0)
    until(lambda: all(pods.ended(box.name) is not None for box in FIRST), "the init containers end", 240.0)
    # Without clicks there is nothing to analyse: Kubernetes starts the bootstrap again, and the trainer behind it waits.
    assert {box.name: pods.ended(box.name) for box in FIRST} == {"bootstrap": 1, "kernels": 0, "rebuild-history": 0}
    assert "bootstrap.min_rows" in pods.log("bootstrap")
    assert "nothing is rebuilt" in pods.log("rebuild-history")
    (worker,) = (box for box in LASTING if box.name == "worker")
    assert pods.get(worker, "readinessProbe") == 503, "there is no version yet"
    for box in LASTING:
        assert "CapEff:\t0000000000000000" in pods.status(box.name), box.name
        assert "Read-only file system" not in pods.log(box.name)
    assert any((pods.folder / "cache").rglob("*.lock")), "kernels use the cache that the manifests mount"
    # The stream's metrics are there before it can end in order.
    until(lambda: all(pods.catches(box.name, signal.SIGTERM) for box in LASTING), "all have begun", 60.0)
    for box in LASTING:
        os.kill(pods.pid(box.name), signal.SIGTERM)
    until(lambda: all(pods.ended(box.name) is not None for box in LASTING), "all end", 60.0)
    assert {box.name: pods.ended(box.name) for box in LASTING} == {box.name: 0 for box in LASTING}
