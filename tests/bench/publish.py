"""Publishing: how long a delta takes to be durable, and how long it keeps the steps waiting.

    python -m tests.bench.publish [ROWS]

A trainer with the default network and `ROWS` user rows (1e7) changes some 10k
rows, then publishes; the file system is that of the working directory. The
machine is shared, so percentiles are given.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.bench.report import Figure, report

CHANGED = 10_000
TIMES = 40


def main(rows: int) -> None:
    """Measures and reports."""
    from prometheus_client import CollectorRegistry

    from state.config.settings import Settings
    from state.features.spec import FeatureSpec
    from state.metrics import TrainerMetrics
    from state.process.quiet_stderr import quiet_stderr
    from state.registry.control import start
    from state.registry.manifest import Draft, LogRange
    from state.registry.registry import Registry

    with quiet_stderr():
        from trainer.engine.step import Trainer
        from trainer.versions import checkpoint, content
        from trainer.versions.publisher import Publisher

    base = Settings()
    spec = FeatureSpec()
    trainer = Trainer(
        dataclasses.replace(
            base, trainer=dataclasses.replace(base.trainer, device="cpu", capacity=rows + 2, max_rows=2 * rows)
        ),
        spec,
    )
    table = trainer.tables["user"]
    every = np.arange(1, rows + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for first in range(0, rows, 1_000_000):
        part = every[first : first + 1_000_000]
        table.observe(part, np.full(part.size, 1, np.int64))
    drawn = np.random.default_rng(0)
    stalls, durable, published = [], [], []
    Path("build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="build") as folder:
        registry = Registry(Path(folder))
        registry.propose(start(actor="bench", reason="bench", now_ms=0))
        publisher = Publisher(Path(folder), TrainerMetrics(CollectorRegistry()))
        empty = {
            name: tensor[:0] if name.startswith("user.") else tensor
            for name, tensor in checkpoint.changes(trainer).items()
        }
        draft = Draft("base", 1, None, LogRange(), (), 0, 0, 0, 0, spec.digest, "", "")
        parent = registry.publish(draft, content.encode(empty)).version
        size = 0
        for _ in range(TIMES):
            changed = drawn.choice(every, CHANGED, replace=False)
            table.observe(changed, np.full(CHANGED, 2, np.int64))
            began = time.perf_counter()
            tensors = checkpoint.changes(trainer)
            publisher.offer(dataclasses.replace(draft, kind="delta", parent=parent), tensors)
            offered = time.perf_counter()
            made = publisher.settle(wait=True)
            done = time.perf_counter()
            assert made is not None
            parent = made.version
            size = sum(entry.bytes for entry in made.files.values())
            stalls.append(1e3 * (offered - began))
            published.append(1e3 * (done - offered))
            durable.append(1e3 * (done - began))
        publisher.close()
    fixed = sum(tensor.nbytes for name, tensor in tensors.items() if not name.startswith("user."))
    report(
        "publish",
        {
            "delta of 10k rows durable, median": Figure(float(np.median(durable)), "ms", "<= 20"),
            "delta of 10k rows durable, p10": Figure(float(np.percentile(durable, 10)), "ms", "<= 20"),
            "delta of 10k rows durable, p90": Figure(float(np.percentile(durable, 90)), "ms"),
            "of it with the steps kept waiting, median": Figure(float(np.median(stalls)), "ms", "<= 10"),
            "of it with the steps kept waiting, p10": Figure(float(np.percentile(stalls, 10)), "ms", "<= 10"),
            "of it with the steps kept waiting, p90": Figure(float(np.percentile(stalls, 90)), "ms"),
            "of it in the background, median": Figure(float(np.median(published)), "ms"),
            "size of the delta": Figure(size / 1e6, "MB"),
            "of it weights and slots, in each version": Figure(fixed / 1e6, "MB"),
            "at five versions a second, an hour, without rows": Figure(fixed * 5 * 3600 / 1e9, "GB"),
        },
        {"user_rows": rows, "changed_rows": CHANGED, "times": TIMES, "load_average": os.getloadavg()[0]},
    )


if __name__ == "__main__":
    main(int(float(sys.argv[1])) if len(sys.argv) > 1 else 10_000_000)
