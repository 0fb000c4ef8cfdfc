"""A shared registry: seconds to send and to bring a version and a base, to a directory and to an S3 store on this machine.

    python -m tests.bench.share [--base-mb 200] [--delta-mb 5]

The link is this machine's own: on a slower one what is sent is the same, and
the time is its bytes over the link's.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from state.file_store import open_store
from state.registry.registry import SERVING, TRAINING
from tests.bench.report import Figure, report
from tests.one_s3 import S3Server
from tests.state.registry.hosts import CopyHost, Link, Origin

LOOKS = 200


def took_s(act: Callable[[], object]) -> float:
    """Seconds that something takes."""
    begun_s = time.perf_counter()
    act()
    return time.perf_counter() - begun_s


def measured(name: str, folder: Path, url: str, base: int, delta: int) -> dict[str, Figure]:
    """A base and a delta of these sizes through one place."""
    origin = Origin(folder / "trainer", url)
    link = Link(open_store(url))
    host = CopyHost(folder / "host", url, link)
    figures: dict[str, Figure] = {}
    parent: int | None = None
    for kind, size in (("base", base), ("version", delta)):
        half = size // 2
        files = {SERVING: os.urandom(half), TRAINING: os.urandom(half)}
        made = origin.registry.publish(origin.draft(parent), files)
        figures[f"{name}: send a {kind} of {size / 1e6:g} MB"] = Figure(took_s(origin.send), "s")
        figures[f"{name}: learn that it is there"] = Figure(took_s(host.look), "s")
        read = took_s(lambda: [host.registry.read(made, one) for one in made.files])  # noqa: B023 - called at once
        figures[f"{name}: bring that {kind}"] = Figure(read, "s")
        parent = made.version
    link.asked.clear()
    figures[f"{name}: a look that finds nothing"] = Figure(took_s(host.copier.step), "s", "<= 0.1")
    figures[f"{name}: requests of such a look"] = Figure(len(link.asked), "requests", "<= 2")
    link.asked.clear()
    begun_s = time.process_time()
    for _ in range(LOOKS):
        host.copier.step()
    figures[f"{name}: processor time of a request"] = Figure(
        1e3 * (time.process_time() - begun_s) / len(link.asked), "ms"
    )
    return figures


def main() -> None:
    """Takes the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-mb", type=float, default=200.0)
    parser.add_argument("--delta-mb", type=float, default=5.0)
    asked = parser.parse_args()
    base, delta = int(asked.base_mb * 1e6), int(asked.delta_mb * 1e6)
    with tempfile.TemporaryDirectory(prefix="springtide-share-") as made, S3Server() as server:
        folder = Path(made)
        figures = measured("directory", folder / "one", str(folder / "place"), base, delta)
        figures |= measured("S3", folder / "two", server.bucket("share") + "/registry", base, delta)
        report("share", figures)


if __name__ == "__main__":
    main()
