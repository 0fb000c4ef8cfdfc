"""The jars of the local Kafka broker: those that `jars.lock` in this directory names.

To change to another Kafka, `python -m deploy.kafka.jars KAFKA_VERSION` resolves them and writes `jars.lock`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from deploy.java_jars import Product, write
from state.errors import KafkaFailed

KAFKA = Product(
    "Kafka",
    KafkaFailed,
    "set kafka.bootstrap_servers to a cluster of yours",
    Path(__file__).with_name("jars.lock"),
)
# Without an SLF4J binding the broker logs nothing.
BINDING = "org.apache.logging.log4j:log4j-slf4j-impl"

if __name__ == "__main__":
    release = sys.argv[1]
    resolved = KAFKA.resolved(f"org.apache.kafka:kafka_2.13:{release}+org.apache.kafka:kafka-tools:{release}")
    (log4j,) = [name.rpartition(":")[2] for name in resolved if ":log4j-core:" in name]
    # Resolved separately, because together with the broker, managed versions select another kafka-clients.
    binding = f"{BINDING}:{log4j}"
    write(KAFKA.lock, resolved | {binding: KAFKA.resolved(binding)[binding]})
