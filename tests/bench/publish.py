"""Publishing: how long a version takes until it can be followed, and until it is durable, and how long it keeps the steps waiting.

    python -m tests.bench.publish [ROWS]

A trainer with the default network and `ROWS` user rows (1e7) changes some 10k
rows before each recent version, and five times as many before each durable
one; the file system is that of the working directory. The machine is shared,
so percentiles are given.
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
DURABLE_EACH = 5


def main(rows: int) -> None:
    """Measures and reports."""
    from prometheus_client import CollectorRegistry

    from state.config.settings import Settings
    from state.features.spec import FeatureSpec
    from state.metrics import TrainerMetrics
    from state.process.part import quiet_stderr
    from state.registry.control import start
    from state.registry.manifest import Draft, LogRange
    from state.registry.registry import Registry

    with quiet_stderr():
        from trainer.engine.step import Trainer
        from trainer.versions import checkpoint, content
        from trainer.versions.publisher import Publisher, Saving

    base = Settings()
    spec = FeatureSpec()
    trainer = Trainer(
        dataclasses.replace(base, trainer=dataclasses.replace(base.trainer, device="cpu", max_rows=2 * rows)),
        spec,
    )
    table = trainer.tables["user"]
    every = np.arange(1, rows + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for first in range(0, rows, 1_000_000):
        users = every[first : first + 1_000_000]
        table.observe(users, np.full(users.size, 1, np.int64))
    drawn = np.random.default_rng(0)
    waited: dict[str, list[float]] = {"recent": [], "durable": []}
    took: dict[str, list[float]] = {"recent": [], "durable": []}
    sizes: dict[str, float] = {}
    Path("build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="build") as folder:
        registry = Registry(Path(folder))
        registry.propose(start(actor="bench", reason="bench", now_ms=0))
        publisher = Publisher(registry, TrainerMetrics(CollectorRegistry()))
        empty = {
            name: tensor[:0] if name.startswith("user.") else tensor
            for name, tensor in checkpoint.changes(trainer).items()
        }
        draft = Draft("base", 1, None, LogRange(), (), 0, 0, 0, 0, spec.digest, "", "")
        parent = saved = registry.publish(draft, content.encode(empty)).version
        for number in range(1, TIMES * DURABLE_EACH + 1):
            changed = drawn.choice(every, CHANGED, replace=False)
            table.observe(changed, np.full(CHANGED, 2, np.int64))
            kind = "recent" if number % DURABLE_EACH else "durable"
            began = time.perf_counter()
            served, saving = checkpoint.served(trainer), None
            if kind == "durable":
                since = dataclasses.replace(draft, kind="delta", parent=saved)
                saving = Saving(since, checkpoint.changes(trainer))
            publisher.offer(dataclasses.replace(draft, kind="recent", parent=parent), served, saving)
            waited[kind].append(1e3 * (time.perf_counter() - began))
            made = publisher.settle(wait=True)[-1]
            took[kind].append(1e3 * (time.perf_counter() - began))
            parent, saved = made.version, made.version if saving else saved
            sizes[kind] = sum(entry.bytes for entry in made.files.values()) / 1e6
        publisher.close()
    figures: dict[str, Figure] = {}
    for kind, rows_changed, most_ms, most_wait_ms in (("recent", 1, 20, 10), ("durable", DURABLE_EACH, 200, 40)):
        name = f"{kind} version of {rows_changed * CHANGED:,} changed rows"
        for part, share in (("p10", 10), ("median", 50), ("p90", 90)):
            figures[f"{name}, {part}"] = Figure(float(np.percentile(took[kind], share)), "ms", f"<= {most_ms}")
            wait = float(np.percentile(waited[kind], share))
            figures[f"of it with the steps kept waiting, {kind}, {part}"] = Figure(wait, "ms", f"<= {most_wait_ms}")
        figures[f"size of the {kind} version"] = Figure(sizes[kind], "MB")
    notes = {"user_rows": rows, "changed_rows": CHANGED, "times": TIMES, "load_average": os.getloadavg()[0]}
    report("publish", figures, notes)


if __name__ == "__main__":
    main(int(float(sys.argv[1])) if len(sys.argv) > 1 else 10_000_000)
