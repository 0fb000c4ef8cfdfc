"""One model trained by several workers on this machine: where the time of a step goes, and what more workers would gain.

    python -m tests.bench.workers
    python -m tests.bench.workers --quality taobao|kuairand [--workers K] [--steps N] [--still]

The leader is measured in processor milliseconds, without and within exchanges. From two and four workers follow the part
of a step that every worker does (`replicated`) and the part that is divided: `compute(K) = replicated + divided / K`.
With as many idle cores as workers a step takes that and the exchange.

With `--quality` one process and K workers train on the same recorded events. The figures are the quality of both, its
difference with a paired 95 % interval over users, and the relative distance of the weights. With `--still` fast weights do
not move within a record, so the distance is that of other orders of sums.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from state.microbatch.batch import Logged
from state.microbatch.codec import decode, encode
from state.process.network import free_ports
from tests.bench.report import Figure, report
from trainer.worker import without_leading

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
    if group is None:
        return Trainer(settings, SPEC)
    return DividedTrainer(settings if group.leads else without_leading(settings), SPEC, None, group)


def run_worker(addresses: Sequence[str], index: int, asked: argparse.Namespace) -> None:
    """Runs one worker; the leader prints the figures as JSON."""
    from trainer.device import prepare

    prepare("cpu", 1)
    from trainer.group import Group

    group = Group(addresses, index) if len(addresses) > 1 else None
    figures = timings(group) if group is None or not asked.quality else qualities(group, asked)
    if not index:
        print(json.dumps(figures), flush=True)


def qualities(group: Group, asked: argparse.Namespace) -> dict[str, float]:
    """Trains one process and a group on the first steps of a recorded log; the figures of both, and the difference."""
    from evaluation.measures import OURS
    from evaluation.report import engagement_tables, interests_tables
    from state.config.loading import load
    from state.features.spec import FeatureSpec
    from tests.bench.quality import analysis, figures_of, validated
    from tests.bench.recorded import KUAIRAND_SETTINGS, read_clicks, read_impressions
    from trainer.engine.divided_step import DividedTrainer
    from trainer.engine.step import Trainer

    is_clicks, steps, device = asked.quality == "taobao", asked.steps, ["--trainer.device", "cpu"]
    settings = load([*([] if is_clicks else ["--config", str(KUAIRAND_SETTINGS)]), *device], {})
    spec, recorded = FeatureSpec.from_settings(settings), read_clicks() if is_clicks else read_impressions(settings)
    preprocessing = analysis(recorded, spec, settings, steps) if is_clicks else None
    several = DividedTrainer(settings, spec, preprocessing, group)
    if asked.still:
        several.optimizer.fast_rate = 0.0
    if not group.leads:
        several.follow(lambda trainer, version: None)
        return {}
    single, other = Trainer(settings, spec, preprocessing), f"{group.size} workers"
    single.optimizer.fast_rate = several.optimizer.fast_rate
    one, group_of = (validated(recorded, settings, trainer, steps) for trainer in (single, several))
    kind, tables = ("interests", interests_tables) if is_clicks else ("engagements", engagement_tables)
    pairs = zip(getattr(one, kind), getattr(group_of, kind), strict=True)
    table = tables([own._replace(scores={OURS: own.scores[OURS], other: its.scores[OURS]}) for own, its in pairs])[0]
    figures = figures_of(table) | distances(single, several)
    several.stop()
    return figures


def distances(one: Trainer, other: Trainer) -> dict[str, float]:
    """The norm of the difference of weights over their norm, by table and for all dense weights."""
    from trainer.versions import checkpoint

    states = checkpoint.full(one), checkpoint.full(other)
    tables = ("user", "item", "category", "context", "cross", "transition")
    arrays = {name: tuple(state[f"{name}.rows"] for state in states) for name in tables}
    dense = sorted(name for name in states[0] if name.startswith("dense."))
    arrays["dense"] = tuple(np.concatenate([state[name].ravel() for name in dense]) for state in states)
    return {
        f"distance of {name}": float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(a.astype(np.float64)))
        for name, (a, b) in arrays.items()
        if a.size
    }


def timings(group: Group | None) -> dict[str, float]:
    """The leader's milliseconds per step."""
    from tests.trainer.batches import micro_batch

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
    if group is not None and not group.leads:
        from trainer.engine.divided_step import DividedTrainer

        assert isinstance(trainer, DividedTrainer)
        trainer.follow(lambda trainer, version: None)
        return {}
    compute, exchange, wall = [], [], []
    for number in range(STEPS):
        made = micro_batch(ROWS, first=number * ROWS, users=USERS, items=50_000, categories=3000)
        value = encode(made.header, made.columns)
        batch = replace(decode(value), logged=Logged(value, np.ones(ROWS, np.bool_)))
        before, began = dict(spent), (time.process_time(), time.perf_counter())
        trainer.step(batch)
        within = spent["cpu"] - before["cpu"]
        compute.append(time.process_time() - began[0] - within)
        exchange.append(within)
        wall.append(spent["wall"] - before["wall"])
    trainer.stop()
    found = {"compute": compute, "exchange": exchange, "waiting": wall}
    return {name: float(np.median(values[WARM_UP:])) * 1e3 for name, values in found.items()}


def measure(count: int, flags: Sequence[str]) -> dict[str, float]:
    """The figures of the leader of `count` workers; `flags` are those of this program."""
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(map(str, range(count))).values())
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", "tests.bench.workers", *flags, "--join", addresses]
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quality", default="", choices=("", "taobao", "kuairand"), help="compare quality on this log")
    parser.add_argument("--workers", type=int, default=2, help="workers to compare with one process")
    parser.add_argument("--steps", type=int, default=40, help="steps of 1,024 rows of the log")
    parser.add_argument("--still", action="store_true", help="without moves of the fast weights within a record")
    parser.add_argument("--join", nargs=2, help="addresses of the workers, and the index of this one")
    asked = parser.parse_args()
    if asked.join:
        run_worker(asked.join[0].split(","), int(asked.join[1]), asked)
        # TensorFlow's server has no end of its own.
        os._exit(0)
    if asked.quality:
        compared = {name: Figure(value, "") for name, value in measure(asked.workers, sys.argv[1:]).items()}
        report(f"workers-{asked.quality}-{asked.workers}{'-still' * asked.still}", compared, {"steps": asked.steps})
        return
    found = {count: measure(count, sys.argv[1:]) for count in MEASURED}
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
