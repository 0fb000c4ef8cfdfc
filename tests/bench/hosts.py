"""Many serving hosts of one system: how soon a version, a pin and an erasure are on all of them, and how soon a new host answers.

    python -m tests.bench.hosts [--hosts 10] [--versions-s 60] [--pins 20] [--erasures 10] [--s3] [--link-mb-s 0.5]

Each host is an applier and a worker in a state directory of its own, all on
this machine beside the loop: Kafka, shoppers, stream, trainer and its own host.
With `--s3` they share the registry through moto's server in place of a file
system; then the requests and bytes of a host are told too, and what moto's
server takes of a core. With `--link-mb-s` each host has a link of so many
megabytes a second to it. A version's delay is from the moment it was made to
that at which a host's rows answer with it.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil

from deploy.watch import scrape
from state import layout
from state.process.environment import wall_ms
from state.registry import control as transitions
from state.registry.registry import Registry
from state.rows.store import RowStore
from tests.bench.report import Figure, Stages, report
from tests.disks import forget_memory
from tests.e2e.hosts import ServingHost
from tests.e2e.running import Loop, until
from tests.one_s3 import S3Server
from tests.slow_link import SlowLink

LOOK_S = 0.01
RATE, USERS = 100, 2000
MEBI = 1024 * 1024
BY = {"actor": "bench", "reason": "a bench"}

progress = Stages("hosts")


class Watch:
    """Looks at the rows of one host all the time, in a thread: when which version began to answer."""

    def __init__(self, host: ServingHost) -> None:
        self._host, self._over = host, threading.Event()
        self.seen: list[tuple[float, int, int]] = []
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        # Opened once: ten that open a store at each look are a quarter of a core.
        last, rows = 0, RowStore(self._host.settings.serving_dir / layout.ROWS, readonly=True)
        while not self._over.is_set():
            with rows.reader() as reader:
                served = reader.served()
            if served is not None and served.version != last:
                last = served.version
                self.seen.append((time.time(), last, served.created_at_ms))
            self._over.wait(LOOK_S)
        rows.close()

    def delays_s(self, since_s: float) -> list[float]:
        """Of the versions that were made since then."""
        return [at - made_ms / 1000 for at, _, made_ms in self.seen if made_ms / 1000 >= since_s]

    def first_at(self, version: int, since_s: float) -> float | None:
        """When it began to answer; None before."""
        return next((at for at, number, _ in self.seen if number == version and at >= since_s), None)

    def close(self) -> None:
        """Ends the thread."""
        self._over.set()
        self._thread.join()


def ready_s(host: ServingHost) -> float:
    """Starts a host; the seconds to its first answer by a version."""
    host.start()
    until(lambda: host.ready and host.profile("anyone") is not None, host.said, 300.0)
    return time.monotonic() - host.begun_s


def pinned_s(registry: Registry, watches: Sequence[Watch], version: int) -> list[float]:
    """Pins a version; of each host the seconds from the command to its answers by it."""
    begun_s = time.time()
    registry.change(lambda now: transitions.pin(now, version, **BY, now_ms=int(begun_s * 1000)))

    def on_all() -> list[float]:
        seen = [one.first_at(version, begun_s) for one in watches]
        return [at - begun_s for at in seen if at is not None] if None not in seen else []

    found = until(on_all, f"version {version} is not on all hosts")
    registry.change(lambda now: transitions.follow(now, **BY, now_ms=wall_ms()))
    return found


def pins(loop: Loop, watches: Sequence[Watch], count: int) -> list[float]:
    """The seconds of that many pins, each to a version that the hosts have, on each host."""
    registry, found = Registry(loop.settings.registry_dir), list[float]()
    for number in range(count):
        progress.say("pins", f"{number} of {count}")
        found += pinned_s(registry, watches, registry.versions()[-2 - number % 3])
        time.sleep(1.0)
    return found


def erased_s(loop: Loop, hosts: Sequence[ServingHost], user: str) -> list[float]:
    """Erases a known shopper; of each host the seconds from the command to its first answer about nobody."""
    until(lambda: all((one.profile(user) or {}).get("known") for one in hosts), f"{user} is not known")
    begun_s, found = time.monotonic(), dict[str, float]()
    loop.springtide("erase", "--user", user, "--reason", BY["reason"])

    def on_all() -> bool:
        for one in hosts:
            if one.name not in found and (one.profile(user) or {}).get("cold_start"):
                found[one.name] = time.monotonic() - begun_s
        return len(found) == len(hosts)

    until(on_all, f"{user} is known on some hosts")
    return [*found.values()]


def erasures(loop: Loop, hosts: Sequence[ServingHost], count: int) -> list[float]:
    """The seconds of that many erasures on each host."""
    found = list[float]()
    for number in range(count):
        progress.say("erasures", f"{number} of {count}")
        found += erased_s(loop, hosts, f"shopper-{number + 1}")
    return found


def traffic(hosts: Sequence[ServingHost]) -> dict[str, float]:
    """Requests by operation and bytes of the hosts' copiers together."""
    total: dict[str, float] = {}
    for host in hosts:
        metrics = scrape.scrape({"applier": scrape.urls(host.settings)["applier"]})["applier"]
        for operation in ("get", "put", "list"):
            value = metrics.value("springtide_shared_requests_total", operation=operation) or 0.0
            total[operation] = total.get(operation, 0.0) + value
        total["bytes"] = total.get("bytes", 0.0) + (
            metrics.value("springtide_shared_bytes_total", direction="received") or 0.0
        )
    return total


def cpu_s(hosts: Sequence[ServingHost]) -> float:
    """Processor time of the hosts' appliers and workers together."""
    parents = [psutil.Process(host.process.pid) for host in hosts if host.process is not None]
    return sum(sum(one.cpu_times()[:2]) for each in parents for one in (each, *each.children(recursive=True)))


def quantiles(name: str, values: Sequence[float], most_s: float) -> dict[str, Figure]:
    """p50 and p99, with the goal of the latter."""
    return {
        f"{name}, p50": Figure(float(np.percentile(values, 50)), "s"),
        f"{name}, p99": Figure(float(np.percentile(values, 99)), "s", f"<= {most_s:g}"),
    }


def main() -> None:
    """Takes the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hosts", type=int, default=10)
    parser.add_argument("--versions-s", type=float, default=60.0)
    parser.add_argument("--pins", type=int, default=20)
    parser.add_argument("--erasures", type=int, default=10)
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--link-mb-s", type=float, default=float("inf"))
    asked = parser.parse_args()
    figures: dict[str, Figure] = {}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="springtide-hosts-")))
        stack.callback(forget_memory, directory)
        shared: dict[str, object] = {}
        server = stack.enter_context(S3Server()) if asked.s3 else None
        if server is not None:
            shared["paths.shared_registry"] = server.bucket("hosts") + "/registry"
        own = {"shoppers.rate": RATE, "shoppers.users": USERS, "bootstrap.min_rows": 2000, "validation.window_s": 0}
        (directory / "loop").mkdir()
        loop = Loop(directory / "loop", {**own, **shared, "console.port": 0})
        progress.say("the loop")
        loop.start()
        stack.callback(loop.stop)
        hosts = []
        for one in range(asked.hosts):
            over: dict[str, str] = {}
            if server is not None and math.isfinite(asked.link_mb_s):
                link = stack.enter_context(SlowLink(server.port, asked.link_mb_s * 1e6))
                over["AWS_ENDPOINT_URL"] = link.url
            hosts.append(ServingHost(f"host {one}", directory / f"host-{one}", loop, shared, over))
            stack.callback(hosts[-1].stop)
        began = []
        for number, host in enumerate(hosts):
            progress.say("hosts", f"{number} of {asked.hosts}")
            began.append(ready_s(host))
        figures["a new host answers, median"] = Figure(float(np.median(began)), "s")
        figures["a new host answers, the last one"] = Figure(began[-1], "s")
        watches = [Watch(host) for host in hosts]
        for watch in watches:
            stack.callback(watch.close)
        time.sleep(5.0)
        progress.say("versions")
        before, since_s = traffic(hosts), time.time()
        cpu = cpu_s(hosts), 0.0 if server is None else server.cpu_s
        time.sleep(asked.versions_s)
        figures["processor time of a host, applier and worker"] = Figure(
            (cpu_s(hosts) - cpu[0]) / asked.hosts / asked.versions_s, "cores"
        )
        delays = [one for watch in watches for one in watch.delays_s(since_s)]
        figures |= quantiles("a version is on a host", delays, 1.0)
        figures["versions that a host took"] = Figure(len(delays) / asked.hosts / asked.versions_s, "1/s")
        if server is not None:
            figures["moto's server"] = Figure((server.cpu_s - cpu[1]) / asked.versions_s, "cores")
            after = traffic(hosts)
            for name in before:
                value = (after[name] - before[name]) / asked.hosts / asked.versions_s
                figures[f"{name} of a host"] = Figure(value, "B/s" if name == "bytes" else "1/s")
        figures |= quantiles("a pin is on a host", pins(loop, watches, asked.pins), 1.0)
        figures |= quantiles("an erased user is nobody on a host", erasures(loop, hosts, asked.erasures), 2.0)
        memory = [psutil.Process(host.process.pid) for host in hosts if host.process is not None]
        mebi = [sum(one.memory_info().rss for one in each.children(recursive=True)) / MEBI for each in memory]
        figures["memory of a host, applier and worker"] = Figure(float(np.median(mebi)), "MiB")
        about: dict[str, object] = {"hosts": asked.hosts}
        if math.isfinite(asked.link_mb_s):
            about["link, MB/s"] = asked.link_mb_s
        report("hosts-s3" if asked.s3 else "hosts", figures, about)


if __name__ == "__main__":
    main()
