"""Measures what a mask of a million users costs a step, an answer, and whoever reads control."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from state.features.mask import Mask
from state.features.masked_users import MaskedUsers
from state.microbatch.batch import masked
from state.registry.control import roll_back, start
from state.registry.controls import Controls
from tests.bench.report import Figure, report
from tests.trainer.batches import micro_batch

USERS, ROWS, ROUNDS = 1_000_000, 2048, 50
WHO = {"actor": "bench", "reason": "measure", "now_ms": 0}


def typical_ms(run: Callable[[], object]) -> float:
    """The median of many rounds, for the machine is shared."""
    taken = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begun)
    return 1000 * statistics.median(taken)


def main() -> None:
    """Measures and reports."""
    rng = np.random.default_rng(7)
    users = MaskedUsers(np.unique(rng.integers(1, 2**64 - 1, USERS, np.uint64)))
    mask = Mask(2, users=users)
    batch = micro_batch(ROWS)
    names = rng.integers(1, 2**64 - 1, ROUNDS, np.uint64).tolist()
    figures = {
        "step": Figure(typical_ms(lambda: masked(batch, mask)), "ms", "<= 1"),
        "answer": Figure(typical_ms(lambda: [name in users for name in names]) / ROUNDS, "ms", "<= 0.01"),
    }
    with tempfile.TemporaryDirectory() as folder:
        controls = Controls(Path(folder), "tmp")
        controls.propose(start(**WHO))
        begun = time.perf_counter()
        controls.change(lambda control: roll_back(control, 1, mask, **WHO))
        figures["written"] = Figure(1000 * (time.perf_counter() - begun), "ms")
        begun = time.perf_counter()
        newest = Controls(Path(folder)).control()
        assert newest is not None and len(newest.mask.users) == len(users)
        figures["read"] = Figure(1000 * (time.perf_counter() - begun), "ms")
        largest = max(path.stat().st_size for path in (Path(folder) / "control").iterdir())
        figures["control file"] = Figure(largest, "bytes", "<= 100000")
    report("masks", figures)


if __name__ == "__main__":
    main()
