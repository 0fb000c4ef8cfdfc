"""The shared kernels are compiled for the types that their users call them with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from state.features.kernel import many_rows, one_row, update_rows
from state.features.many import vectorise_many
from state.features.mask import Mask
from state.features.masked_users import MaskedUsers
from state.features.spec import EVENT, FeatureSpec, vectorise
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.kernels import compile_shared
from streaming.profile import Profiler


def test_serving_and_stream_find_their_kernels_compiled(tmp_path: Path) -> None:
    spec = FeatureSpec()
    compile_shared(spec)
    kernels = one_row, many_rows, update_rows
    before = [len(kernel.signatures) for kernel in kernels]  # type: ignore[attr-defined]
    # 1. As serving reads and computes, with a mask and without.
    store = HistoryStore(tmp_path, history=spec.history)
    store.commit(Appends.of(np.full(40, 7, np.uint64), np.zeros(40, EVENT)))
    masked = Mask(generation=2, offsets=((1, 2, 3, 4),), times=((5, 6),), users=MaskedUsers.of([9]))
    for user in (7, 8):
        for mask in (Mask.NONE, masked):
            vectorise(store.read(user), 1_700_000_000_000, None, mask, spec, user)
            vectorise_many([store.read(user)], [1_700_000_000_000], mask, spec, [user])
    # 2. As the stream does.
    Profiler(store, spec, cache_users=10)
    Profiler(store, spec, cache_users=10, mask=masked)
    store.close()
    assert [len(kernel.signatures) for kernel in kernels] == before  # type: ignore[attr-defined]
