"""Compiles the kernels that several processes share: `python -m state.kernels`.

In a fresh clone stream, bootstrap and worker would each compile the same code
for some ten seconds, at the same time. `springtide up` runs this first, beside
the start of Kafka; they then find the machine code in Numba's cache.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from state.config.loading import load
from state.errors import SpringtideError
from state.features.arrays import WORDS, words
from state.features.kernel import update_rows
from state.features.many import vectorise_many
from state.features.mask import Mask
from state.features.spec import EVENT, FeatureSpec, vectorise
from state.ranking.transition_rows import from_stored
from state.ranking.transitions import succession


def compile_shared(spec: FeatureSpec) -> None:
    """Calls each shared kernel once, with the types that its users call it with."""
    # 1. As serving does; what a store reads cannot be written to, which is a type of its own.
    event = np.frombuffer(bytes(EVENT.itemsize), EVENT)
    vectorise(event, 1, None, Mask.NONE, spec)
    vectorise_many([event], [1], Mask.NONE, spec, [0])
    none = np.zeros((1, spec.recent_categories), np.uint64)
    at, lists = from_stored([None])
    succession(at, lists, none, np.zeros(1, np.uint64))
    # 2. As the stream and the bootstrap do.
    empty = np.empty(0, np.int64)
    update_rows(
        np.empty((0, spec.history, WORDS), np.int64),
        empty,
        empty,
        empty,
        words(np.empty(0, EVENT)),
        spec.tables,
        Mask.NONE.hidden,
        spec.empty(0),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Fills the cache; returns the exit code."""
    try:
        compile_shared(FeatureSpec.from_settings(load(sys.argv[1:] if argv is None else argv)))
    except SpringtideError as error:
        print(f"kernels: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
