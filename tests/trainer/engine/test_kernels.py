"""Kernels of the trainer: a step compiles none, and blocks do not depend on what else the process has loaded."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from state.compiled import FIRST_CALLS
from state.compiled.preparing import Kernels
from state.microbatch.batch import MicroBatch
from state.microbatch.codec import decode, encode
from tests.trainer.batches import SPEC, START_MS, micro_batch
from tests.trainer.engine.test_step import settings
from trainer.engine.compiled.tower import rows_of_block
from trainer.engine.step import Trainer


def batches() -> list[MicroBatch]:
    """Records as the log gives them, an hour apart: rows are admitted, used again and expire."""
    return [
        decode(encode(batch.header, batch.columns))
        for batch in (micro_batch(64, first=64 * n, at_ms=START_MS + 3_600_000 * n) for n in range(4))
    ]


@pytest.mark.parametrize("labelled", [False, True])
def test_a_step_compiles_no_kernel(labelled: bool) -> None:
    trainer = Trainer(settings(), SPEC)
    Kernels(CollectorRegistry(), logging.getLogger()).prepare()
    FIRST_CALLS.clear()
    for batch in batches():
        if labelled:
            batch = dataclasses.replace(batch, label=np.ones(len(batch), np.float32))
        trainer.step(batch)
    assert not FIRST_CALLS


BLOCKS = "from trainer.engine.compiled.tower import rows_of_block; "
BLOCKS += "print([rows_of_block(weights) for weights in (1_000, 100_000)])"


def test_blocks_are_the_same_whatever_else_the_process_has_loaded() -> None:
    line = [sys.executable, "-c", f"import faiss; {BLOCKS}"]
    there = subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    assert there == f"{[rows_of_block(weights) for weights in (1_000, 100_000)]}"
