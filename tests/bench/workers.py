"""One model trained by several workers on this machine: where the time of a step goes, and what more workers would gain.

    python -m tests.bench.workers

The leader is measured in processor milliseconds, without and within exchanges. From two and four workers follow the part
of a step that every worker does (`replicated`) and the part that is divided: `compute(K) = replicated + divided / K`.
With as many idle cores as workers a step takes that and the exchange.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from state.process.ports import free_ports
from tests.bench.report import Figure, report

if TYPE_CHECKING:
    from trainer.engine.step import Trainer
    from trainer.group import Group

ROWS, USERS, STEPS, WARM_UP = 1024, 100_000, 60, 10
MEASURED, PREDICTED = (1, 2, 4), (4, 16, 64)


def trainer_of(group: Group | None) -> Trainer:
    """A trainer with the default settings, of a group if one is given."""
    from state.config.loading import load
    from tests.trainer.batches import SPEC
    from trainer.engine.divided_step import DividedTrainer
    from trainer.engine.step import Trainer

    settings = load(["--trainer.device", "cpu"], {})
    return Trainer(settings, SPEC) if group is None else DividedTrainer(settings, SPEC, None, group)


def run_worker(addresses: Sequence[str], index: int) -> None:
    """Runs one worker; prints its milliseconds per step as JSON."""
    from trainer.device import prepare

    prepare("cpu", 1)
    from tests.trainer.batches import micro_batch
    from trainer.group import Group

    group = Group(addresses, index) if len(addresses) > 1 else None
    spent = {"cpu": 0.0, "wall": 0.0}

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            began = time.process_time(), time.perf_counter()
            try:
                return call(*given, **named)
            finally:
                spent["cpu"] += time.process_time() - began[0]
                spent["wall"] += time.perf_counter() - began[1]

        return run

    if group is not None:
        for name in ("gather", "send", "receive"):
            setattr(group, name, timed(getattr(group, name)))
    trainer = trainer_of(group)
    if index:
        trainer.follow(lambda trainer, version: None)  # type: ignore[attr-defined]
        return
    compute, exchange, wall = [], [], []
    for number in range(STEPS):
        batch = micro_batch(ROWS, first=number * ROWS, users=USERS, items=50_000, categories=3000)
        before, began = dict(spent), (time.process_time(), time.perf_counter())
        trainer.step(batch)
        within = spent["cpu"] - before["cpu"]
        compute.append(time.process_time() - began[0] - within)
        exchange.append(within)
        wall.append(spent["wall"] - before["wall"])
    trainer.stop()
    found = {"compute": compute, "exchange": exchange, "waiting": wall}
    print(json.dumps({name: float(np.median(values[WARM_UP:])) * 1e3 for name, values in found.items()}), flush=True)


def measure(count: int) -> dict[str, float]:
    """The leader's milliseconds per step with `count` workers."""
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(map(str, range(count))).values())
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", "tests.bench.workers", addresses]
    others = [subprocess.Popen([*command, str(index)], env=environment) for index in range(1, count)]
    try:
        done = subprocess.run([*command, "0"], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        for each in others:
            each.kill()
            each.wait()
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measures, prints and writes the figures."""
    if len(sys.argv) > 2:
        run_worker(sys.argv[1].split(","), int(sys.argv[2]))
        # TensorFlow's server has no end of its own.
        os._exit(0)
    found = {count: measure(count) for count in MEASURED}
    figures: dict[str, Figure] = {}
    for count, parts in found.items():
        for name, value in parts.items():
            if count > 1 or name == "compute":
                unit = "ms" if name == "waiting" else "cpu-ms"
                figures[f"{name} of the leader, {count} workers"] = Figure(value, unit)
    divided = 4 * (found[2]["compute"] - found[4]["compute"])
    replicated = found[4]["compute"] - divided / 4
    figures["replicated part of a step"] = Figure(float(replicated), "cpu-ms")
    figures["divided part of a step"] = Figure(float(divided), "cpu-ms")
    growth = (found[4]["exchange"] - found[2]["exchange"]) / 2
    for count in PREDICTED:
        exchange = found[2]["exchange"] + growth * (count - 2)
        step = replicated + divided / count + exchange
        figures[f"predicted speed-up of {count} workers"] = Figure(float(found[1]["compute"] / step), "ratio")
        bound = found[1]["compute"] / (replicated + divided / count)
        figures[f"predicted speed-up of {count} workers, exchange hidden"] = Figure(float(bound), "ratio")
    report("workers", figures, {"rows": ROWS, "users": USERS})


if __name__ == "__main__":
    main()
