"""The tower's blocks, and so the bits of a step, follow from the processor alone."""

from __future__ import annotations

import subprocess
import sys

BLOCKS = "from trainer.engine.compiled.tower import rows_of_block, weights_of_block; "
BLOCKS += "print([rows_of_block(weights) for weights in (1_000, 100_000)], weights_of_block(384, 128))"


def blocks(before: str) -> str:
    done = subprocess.run([sys.executable, "-c", before + BLOCKS], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_blocks_are_the_same_whatever_else_the_process_has_loaded() -> None:
    """The OpenBLAS of faiss is older, and may name the same processor otherwise."""
    assert blocks("import faiss; ") == blocks("")
