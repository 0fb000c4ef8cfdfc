"""The training step: by size of the user table, by rows of a record, by threads, and against Keras' own training step.

    python -m tests.bench.step

Each size and the Keras peer run in a process of their own, on one thread but
where threads are compared, by wall time: that wants a machine with idle cores.
Seconds are processor seconds of that process, so that neighbours on the
machine disturb them little. The speed-up by threads is measured, and predicted
from the parts of a step on one thread. One thread runs the heads, in which a row
depends on those before it. Meanwhile the others run the layers of the tower, for
rows that the heads need next or have learned. All threads share the derivatives
by the tower's weights. The rest is serial. The peer is `train_on_batch` with Adam: three
`keras.layers.Embedding` of width 32 (1e7 users) and 128 -> 256 -> 128 -> 20.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.bench.report import Figure, report

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from state.microbatch.batch import MicroBatch
    from trainer.engine.step import Trainer

SIZES = (100_000, 1_000_000, 10_000_000)
ROWS, FEWER = 1024, (40, 600)
STEPS = 60
THREADS = 2
PREDICTED = (2, 4, 8, 16)
PARTS = ("serial_ms", "tasks_ms", "heads_ms", "layers_ms", "weights_ms")


def predicted_speed_up(parts: Mapping[str, float], threads: int) -> float:
    """By how much threads make a step faster, from the milliseconds of its parts on one thread.

    >>> parts = {"serial_ms": 1.0, "tasks_ms": 2.0, "heads_ms": 4.0, "layers_ms": 2.0, "weights_ms": 3.0}
    >>> predicted_speed_up(parts | {"longest_tasks_ms": 1.0}, 3)
    1.7142857142857142
    """
    tasks_ms = max(parts["longest_tasks_ms"], parts["tasks_ms"] / threads)
    rows_ms = max(parts["heads_ms"], parts["layers_ms"] / (threads - 1))
    shared_ms = tasks_ms + rows_ms + parts["weights_ms"] / threads
    return sum(parts[name] for name in PARTS) / (parts["serial_ms"] + shared_ms)


def measure_parts(users: int, rows: int = ROWS) -> dict[str, float]:
    """Processor milliseconds of the parts of one step on one thread."""
    from trainer.engine.compiled.engine import CompiledEngine
    from trainer.engine.compiled.threads import Threads, Work

    class TimedThreads(Threads):
        """Times the works of a step: the layers forward, the heads and the layers backward; then the weights.

        Also times the tasks, and the longest of each group that threads share.
        """

        def __init__(self) -> None:
            super().__init__(1)
            self.took_s, self.tasks_s, self.longest_s = [0.0] * 4, 0.0, 0.0

        def share(self, *tasks: Callable[[], Any]) -> list[Any]:
            results, times_s = [], []
            for task in tasks:
                began_s = time.process_time()
                results.append(task())
                times_s.append(time.process_time() - began_s)
            self.tasks_s, self.longest_s = self.tasks_s + sum(times_s), self.longest_s + max(times_s)
            return results

        def run(self, *stages: Sequence[Work], progress: NDArray[np.int64] | None = None) -> None:
            for number, work in enumerate(work for stage in stages for work in stage):
                began_s = time.process_time()
                work(0)
                self.took_s[number] += time.process_time() - began_s

    trainer, batches = made(users, rows, 1)
    threads, engine = TimedThreads(), trainer.engine
    assert isinstance(engine, CompiledEngine)
    engine.threads = threads
    for batch in batches[:10]:
        trainer.step(batch)
    found: dict[str, list[float]] = {name: [] for name in (*PARTS, "longest_tasks_ms")}
    for batch in batches:
        threads.took_s, threads.tasks_s, threads.longest_s, began_s = [0.0] * 4, 0.0, 0.0, time.process_time()
        trainer.step(batch)
        serial_s = time.process_time() - began_s - sum(threads.took_s) - threads.tasks_s
        forward_s, heads_s, backward_s, weights_s = threads.took_s
        parts_s = serial_s, threads.tasks_s, heads_s, forward_s + backward_s, weights_s, threads.longest_s
        for name, part_s in zip(found, parts_s, strict=True):
            found[name].append(part_s * 1e3)
    return {name: float(np.median(values)) for name, values in found.items()}


def made(users: int, rows: int, threads: int) -> tuple[Trainer, list[MicroBatch]]:
    """A trainer with `users` user rows, and records of `rows` rows for it."""
    from state.config.settings import Settings
    from tests.trainer.batches import SPEC, START_MS, micro_batch, spread
    from trainer.engine.step import Trainer

    base = Settings()
    trainer = Trainer(
        dataclasses.replace(
            base,
            trainer=dataclasses.replace(base.trainer, device="cpu", max_rows=2 * users, threads=threads),
        ),
        SPEC,
    )
    for first in range(1, users + 1, 1_000_000):
        numbers = np.arange(first, min(first + 1_000_000, users + 1))
        trainer.tables["user"].observe(spread(numbers), np.full(numbers.size, START_MS))
    return trainer, [
        micro_batch(rows, first=number * rows, users=users, items=50_000, categories=3000) for number in range(STEPS)
    ]


def measure_step(users: int, rows: int = ROWS, threads: int = 1) -> dict[str, float]:
    """Milliseconds of one step of `rows` rows with `users` user rows."""
    trainer, batches = made(users, rows, threads)
    for batch in batches[:10]:
        trainer.step(batch)
    cpu, wall = [], []
    for batch in batches:
        began = time.process_time(), time.perf_counter()
        trainer.step(batch)
        cpu.append(time.process_time() - began[0])
        wall.append(time.perf_counter() - began[1])
    return {"cpu_ms": float(np.median(cpu)) * 1e3, "wall_ms": float(np.median(wall)) * 1e3}


def measure_keras(users: int, steps: int = 4) -> dict[str, float]:
    """Milliseconds of `train_on_batch` of a Keras model of the same kind."""
    import keras

    from trainer.device import prepare

    prepare("cpu", threads=1)
    inputs = [keras.Input((1,), dtype="int32") for _ in range(3)]
    sizes = (users, 50_000, 3000)
    rows = [
        keras.layers.Flatten()(keras.layers.Embedding(size, 32)(each)) for size, each in zip(sizes, inputs, strict=True)
    ]
    features = keras.Input((128,))
    x = keras.layers.Concatenate()([features, *rows])
    x = keras.layers.Dense(128, activation="relu")(x)
    x = keras.layers.Dropout(0.3)(keras.layers.Dense(256, activation="relu")(x))
    x = keras.layers.Dense(20)(keras.layers.Dense(128, activation="relu")(x))
    model = keras.Model([features, *inputs], x)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(0)
    given = [
        rng.random((ROWS, 128), np.float32),
        *(rng.integers(0, size, (ROWS, 1)).astype(np.int32) for size in sizes),
    ]
    target = rng.integers(0, 20, ROWS)
    model.train_on_batch(given, target)
    cpu, wall = [], []
    for _ in range(steps):
        began = time.process_time(), time.perf_counter()
        model.train_on_batch(given, target)
        cpu.append(time.process_time() - began[0])
        wall.append(time.perf_counter() - began[1])
    return {"cpu_ms": float(np.median(cpu)) * 1e3, "wall_ms": float(np.median(wall)) * 1e3}


def in_process(what: str, *numbers: int) -> dict[str, float]:
    """Runs one measurement in a process of its own."""
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.step", what, *map(str, numbers)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measures, prints and writes the figures."""
    if len(sys.argv) > 2:
        kind: Callable[..., dict[str, float]] = {
            "step": measure_step,
            "parts": measure_parts,
            "keras": measure_keras,
        }[sys.argv[1]]
        print(json.dumps(kind(*map(int, sys.argv[2:]))))
        return
    steps = {users: in_process("step", users) for users in SIZES}
    keras = in_process("keras", SIZES[-1])
    figures: dict[str, Figure] = {}
    for users, found in steps.items():
        figures[f"step at {users:.0e} user rows"] = Figure(found["cpu_ms"], "cpu-ms")
        figures[f"examples per cpu-s at {users:.0e} user rows"] = Figure(
            ROWS / found["cpu_ms"] * 1e3, "examples/s", ">= 80000"
        )
    for rows in FEWER:
        figures[f"step of {rows} rows at 1e+05 user rows"] = Figure(
            in_process("step", SIZES[0], rows)["cpu_ms"], "cpu-ms"
        )
    shared = in_process("step", SIZES[0], ROWS, THREADS)["wall_ms"]
    figures[f"speed-up of {THREADS} threads"] = Figure(steps[SIZES[0]]["wall_ms"] / shared, "ratio", ">= 1.7")
    parts = in_process("parts", SIZES[0])
    for name in parts:
        figures[f"{name.removesuffix('_ms')} part of a step at 1e+05 user rows"] = Figure(parts[name], "cpu-ms")
    for threads in PREDICTED:
        figures[f"predicted speed-up of {threads} threads"] = Figure(predicted_speed_up(parts, threads), "ratio")
    figures["step at 1e7 over step at 1e5 user rows"] = Figure(
        steps[SIZES[-1]]["cpu_ms"] / steps[SIZES[0]]["cpu_ms"], "ratio", "<= 1.5"
    )
    figures["Keras train_on_batch at 1e7 user rows"] = Figure(keras["cpu_ms"], "cpu-ms")
    figures["Keras over ours at 1e7 user rows"] = Figure(keras["cpu_ms"] / steps[SIZES[-1]]["cpu_ms"], "ratio", ">= 50")
    wall = {f"{users:.0e}": found["wall_ms"] for users, found in steps.items()} | {"keras": keras["wall_ms"]}
    report("step", figures, {"rows": ROWS, "threads": 1, "wall_ms": wall})


if __name__ == "__main__":
    main()
