"""The jars of the local Flink cluster: those that `jars.lock` names, merged into one.

For another Flink or Beam, change the versions below; `python -m deploy.flink.jars` resolves them and writes `jars.lock`.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from deploy.java_jars import Product, write
from state.errors import FlinkFailed, reason_of

LOCK = Path(__file__).with_name("jars.lock")
INSTEAD = "give `springtide stream --runner flink` the job server of your own cluster"
# The newest runner whose dependencies are all on Maven Central. It accepts jobs of Beam's newer Python SDK.
BEAM, VERSION = "2.62.0", "1.19.0"
CONSISTS_OF = (
    f"org.apache.beam:beam-runners-flink-1.19:{BEAM}",
    f"org.apache.flink:flink-statebackend-rocksdb:{VERSION}",
    # Without an SLF4J binding nothing is logged.
    "org.slf4j:slf4j-simple:1.7.30",
)
SERVICES, MANIFEST = "META-INF/services/", "META-INF/MANIFEST.MF"
# Signatures apply to single jars; native libraries of other systems and rare processors are never loaded.
LEFT_OUT = re.compile(
    r"/$|(^|/)module-info\.class$|^META-INF/.*\.(SF|DSA|RSA|EC)$"
    r"|\.(dll|jnilib|dylib)$|(ppc64|s390|riscv|loongarch|linux32).*\.so$"
)


def flink(lock: Path = LOCK) -> Product:
    """Returns Flink with its lock file."""
    return Product("Flink", FlinkFailed, INSTEAD, lock)


def merged_jar(say: Callable[[str], None], directory: Path | None = None, lock: Path = LOCK) -> Path:
    """Returns the path of the merged jar in `directory`, by default the user's cache; creates it if missing or damaged.

    Raises:
        FlinkFailed: A jar cannot be fetched or has another digest, or there is no disk space for the merged jar.
    """
    if directory is None:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "springtide"
    name = f"flink-{hashlib.sha256(lock.read_bytes()).hexdigest()[:16]}"
    path, digest = directory / f"{name}.jar", directory / f"{name}.sha256"
    if path.is_file() and digest.is_file() and digest.read_text() == _digest(path):
        return path
    jars = flink(lock).jars(say=say)
    say(f"merging {len(jars)} jars into {path}, once")
    temporary = directory / f"{name}.{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            merge(jars, temporary)
            written = _digest(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        digest.write_text(written)
    except OSError as problem:
        raise FlinkFailed(
            f"Flink's jars cannot be merged ({reason_of(problem)})",
            f"free some space, or correct the access rights of {directory}",
        ) from problem
    return path


def merge(paths: Sequence[Path], target: Path) -> None:
    """Merges jars, in the order of a class path: the first file of a name wins, and lists of services are joined.

    Raises:
        OSError: A jar cannot be read, or the disk is full.
    """
    services: dict[str, dict[str, None]] = {}
    written = {MANIFEST}
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as merged:
        # Some libraries contain classes for newer releases of Java.
        merged.writestr(MANIFEST, "Manifest-Version: 1.0\nMulti-Release: true\n")
        for path in paths:
            with zipfile.ZipFile(path) as jar:
                for name in jar.namelist():
                    if LEFT_OUT.search(name) or name in written:
                        continue
                    if name.startswith(SERVICES):
                        lines = (line.partition("#")[0].strip() for line in jar.read(name).decode().splitlines())
                        services.setdefault(name, {}).update(dict.fromkeys(line for line in lines if line))
                    else:
                        written.add(name)
                        merged.writestr(name, jar.read(name), compress_type=zipfile.ZIP_DEFLATED)
        for name, providers in services.items():
            merged.writestr(name, "".join(f"{provider}\n" for provider in providers))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    # `!` keeps the versions that each artifact declares. The versions that Flink manages lack methods that Beam calls.
    write(LOCK, flink().resolved("+".join(f"{artifact}!" for artifact in CONSISTS_OF)))
