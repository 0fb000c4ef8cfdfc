"""Hot reload under fire: a version every 0.2 s, a thousand in a row, while a worker is asked 500 times a second.

The default network; from the half on versions are of another graph with other
features. Trainer, applier and clients are processes of their own, as is the
worker. Each fourth answer is computed again from what it says of itself. What
a swap costs is compared with a stretch without swaps in the same run.

    python -m tests.bench.reload [--swaps 1000] [--each 0.2] [--rate 500]
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import tempfile
import time
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np

from state.config.settings import Settings
from state.features.spec import FeatureSpec
from state.process.ports import free_port
from state.registry.registry import Registry
from tests.bench.report import Figure, report
from tests.deploy.serving.fire import Asked, HostWriter, Line, Trainer, ask, events_of
from tests.deploy.serving.stocked import CATEGORIES, SALT_KEY, Stores
from tests.deploy.serving.test_rest import answers, until, worker

STEADY_S, WARM_S = 60.0, 5.0
CLICKS = [("ann", CATEGORIES[place % 4], 1000 * (50 - place)) for place in range(20)] + [("bob", "books", 9000)]
OTHERS = 500
"""Rows of other users that each version changes."""


def follow(settings: Settings, ended: Event) -> None:
    """The applier's process."""
    host = HostWriter(settings)
    for user, category, age_ms in CLICKS:
        host.click(user, category, age_ms)
    while not ended.wait(0.02):
        host.settle()
    host.close()


def ask_twice(port: int, rate: float, steady_over: Event, ended: Event, found: Any) -> None:
    """The clients' process: without swaps, and with them."""
    for over in (steady_over, ended):
        asked = Asked()
        asyncio.run(ask(port, rate, over.is_set, asked))
        found.put(asked)


def lines_of(settings: Settings) -> list[Line]:
    """The default network, and another graph of other features."""
    from trainer.model.default_ranker import DefaultRanker
    from trainer.versions.lowering import build

    spec, made = FeatureSpec(), []
    other = replace(spec, recent_categories=spec.recent_categories - 2)
    for model, of in ((settings.model, spec), (replace(settings.model, hidden=(192, 96)), other)):
        ranker = DefaultRanker(model, of)
        made.append(Line(ranker, build(ranker), of))
    return made


def measure(settings: Settings, swaps: int, each_s: float, rate: float) -> dict[str, Figure]:
    """All figures."""
    trainer = Trainer(Registry(settings.registry_dir), lines_of(settings), settings.model.dim, OTHERS)
    trainer.publish()
    spawn = multiprocessing.get_context("spawn")
    steady_over, ended, found, port = spawn.Event(), spawn.Event(), spawn.Queue(), free_port()
    applier = spawn.Process(target=follow, args=(settings, ended))
    clients = spawn.Process(target=ask_twice, args=(port, rate, steady_over, ended, found))
    applier.start()
    with worker(Stores(settings, *[None] * 3), port) as process:  # type: ignore[list-item]
        until(lambda: answers(port, "/readyz"))
        clients.start()
        time.sleep(WARM_S + STEADY_S)
        steady_over.set()
        steady = found.get()
        memory = [sampled(process.pid, applier.pid)]
        begun_s = time.monotonic()
        for swap in range(swaps):
            trainer.publish(int(swap >= swaps // 2))
            if swap in (swaps // 2 + swaps // 10, swaps - 1):
                memory.append(sampled(process.pid, applier.pid))
            time.sleep(max(0.0, begun_s + (swap + 1) * each_s - time.monotonic()))
        took_s = time.monotonic() - begun_s
        ended.set()
        fired = found.get()
        clients.join()
    applier.join()
    checked = fired.answers()
    wrong = trainer.differences(checked, events_of(CLICKS))
    quiet, under = ((1e3 * np.percentile(one.waited_s, [50, 99])).tolist() for one in (steady, fired))
    growth = [last - early for early, last in zip(memory[-2], memory[-1], strict=True)]
    return {
        "versions a second": Figure(swaps / took_s, "1/s"),
        "versions that were answered with": Figure(len({one["version"]["number"] for one in checked}), "versions"),
        "requests": Figure(len(fired.waited_s), "requests"),
        "requests failed": Figure(sum((steady.failed + fired.failed).values()), "requests", "<= 0"),
        "answers computed again": Figure(len(checked), "answers"),
        "answers of two versions": Figure(len(wrong), "answers", "<= 0"),
        "p50 without swaps": Figure(quiet[0], "ms"),
        "p50 with swaps": Figure(under[0], "ms"),
        "p99 without swaps": Figure(quiet[1], "ms"),
        "p99 with swaps": Figure(under[1], "ms"),
        "p99 with swaps to without": Figure(under[1] / quiet[1], "ratio", "<= 1.2"),
        "growth of the worker over the last four tenths": Figure(growth[0] / 1e6, "MB", "<= 4"),
        "growth of the applier likewise": Figure(growth[1] / 1e6, "MB", "<= 4"),
    }


def sampled(*processes: int | None) -> list[int]:
    """Bytes that processes have allocated themselves, without pages of files: the kernel drops these when it needs memory."""
    status = [Path(f"/proc/{process}/status").read_text() for process in processes if process is not None]
    return [1024 * int(text.partition("RssAnon:")[2].split()[0]) for text in status]


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--each", type=float, default=0.2)
    parser.add_argument("--rate", type=float, default=500.0)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="springtide-bench-") as folder:
        settings = Settings()
        settings = replace(
            settings,
            paths=replace(settings.paths, state=folder),
        )
        settings.salt_path.write_text(SALT_KEY.decode())
        settings.salt_path.chmod(0o600)
        figures = measure(settings, wanted.swaps, wanted.each, wanted.rate)
    notes = {"swaps": wanted.swaps, "each_s": wanted.each, "requests_per_s": wanted.rate, "load": os.getloadavg()[0]}
    report("reload", figures, notes)


if __name__ == "__main__":
    main()
