"""The training step: by size of the user table, by rows of a record, by threads, and against Keras' own training step.

    python -m tests.bench.step

Each size and the Keras peer run in a process of their own, on one thread but
where threads are compared, by wall time: that wants a machine with idle cores.
Seconds are processor seconds of that process, so that neighbours on the
machine disturb them little. The peer is `train_on_batch` with Adam: three
`keras.layers.Embedding` of width 32 (1e7 users) and 128 -> 256 -> 128 -> 20.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from tests.bench.report import Figure, report

SIZES = (100_000, 1_000_000, 10_000_000)
ROWS, FEWER = 1024, (40, 600)
STEPS = 60
THREADS = 2


def measure_step(users: int, rows: int = ROWS, threads: int = 1) -> dict[str, float]:
    """Milliseconds of one step of `rows` rows with `users` user rows."""
    from state.config.settings import Settings
    from tests.trainer.batches import SPEC, START_MS, micro_batch, spread
    from trainer.engine.step import Trainer

    base = Settings()
    trainer = Trainer(
        dataclasses.replace(
            base,
            trainer=dataclasses.replace(
                base.trainer, device="cpu", capacity=users + 2, max_rows=2 * users, threads=threads
            ),
        ),
        SPEC,
    )
    for first in range(1, users + 1, 1_000_000):
        numbers = np.arange(first, min(first + 1_000_000, users + 1))
        trainer.tables["user"].observe(spread(numbers), np.full(numbers.size, START_MS))
    batches = [
        micro_batch(rows, first=number * rows, users=users, items=50_000, categories=3000) for number in range(STEPS)
    ]
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
        kind: Callable[..., dict[str, float]] = {"step": measure_step, "keras": measure_keras}[sys.argv[1]]
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
    figures["step at 1e7 over step at 1e5 user rows"] = Figure(
        steps[SIZES[-1]]["cpu_ms"] / steps[SIZES[0]]["cpu_ms"], "ratio", "<= 1.5"
    )
    figures["Keras train_on_batch at 1e7 user rows"] = Figure(keras["cpu_ms"], "cpu-ms")
    figures["Keras over ours at 1e7 user rows"] = Figure(keras["cpu_ms"] / steps[SIZES[-1]]["cpu_ms"], "ratio", ">= 50")
    wall = {f"{users:.0e}": found["wall_ms"] for users, found in steps.items()} | {"keras": keras["wall_ms"]}
    report("step", figures, {"rows": ROWS, "threads": 1, "wall_ms": wall})


if __name__ == "__main__":
    main()
