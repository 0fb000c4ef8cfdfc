"""The tower's blocks, and so the bits of a step, follow from the processor alone."""

from __future__ import annotations

import subprocess
import sys

from trainer.engine.compiled.tower import rows_of_block, weights_of_block

BLOCKS = "from trainer.engine.compiled.tower import rows_of_block, weights_of_block; "
BLOCKS += "print([rows_of_block(weights) for weights in (1_000, 100_000)], weights_of_block(384, 128))"


def test_blocks_are_the_same_whatever_else_the_process_has_loaded() -> None:
    line = [sys.executable, "-c", f"import faiss; {BLOCKS}"]
    there = subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    assert there == f"{[rows_of_block(weights) for weights in (1_000, 100_000)]} {weights_of_block(384, 128)}"
