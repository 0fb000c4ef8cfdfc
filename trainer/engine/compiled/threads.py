"""Threads that share the loops of a step.

A loop is divided into fixed blocks; thread `i` of `n` takes blocks `i`, `i + n`, ... So any number of threads gives the
same bits. Within a compiled loop, `meet` is the barrier.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg.cython_blas  # noqa: F401  loads the BLAS of compiled loops, for threadpool_limits
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from threadpoolctl import threadpool_limits

from state.compiled import compiled_sums, part_of_sums

I64 = npt.NDArray[np.int64]
Work = Callable[[int], None]
"""The work of one thread, called with the thread's number."""

_SPINS = 2000
"""How often a waiting thread spins before it yields: a few microseconds."""

_yield = types.ExternalFunction("sched_yield", types.int32())


class Threads:
    """Runs a function once per thread. The calling thread is one of them.

    Attributes:
        count: Threads.
        meeting: `[2]` int64, state of the barrier `meet`: arrived threads, and completed meetings.
    """

    def __init__(self, count: int) -> None:
        # Without this, BLAS would divide each product among its own threads.
        threadpool_limits(1, "blas")
        self.count = count
        self.meeting: I64 = np.zeros(2, np.int64)
        self._pool = ThreadPoolExecutor(count - 1, "step") if count > 1 else None

    def run(self, *works: Work) -> None:
        """Calls each `work(thread)` on all threads in parallel, one work after another; returns when all calls have returned.

        Raises:
            Exception: What the first failed call raised.
        """

        def part(thread: int) -> None:
            for number, work in enumerate(works):
                if number and self.count > 1:
                    meet_all(self.meeting, self.count)
                work(thread)

        futures = [self._pool.submit(part, thread) for thread in range(1, self.count)] if self._pool else []
        part(0)
        for other in futures:
            other.result()


def _adding(_context: Any, array: Any, index: Any, value: Any) -> Any:
    """Adds to one entry of an int64 array, atomically; returns the previous value."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        at = cgutils.get_item_pointer(context, builder, signature.args[0], array, [arguments[1]])
        return builder.atomic_rmw("add", at, arguments[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), generate


_add: Any = intrinsic(_adding)


@part_of_sums
def meet(meeting: I64, threads: int) -> None:
    """A barrier: returns once each of `threads` threads has called it. Writes before it are visible to all after it."""
    if threads == 1:
        return
    number = _add(meeting, 1, 0)
    if _add(meeting, 0, 1) == threads - 1:
        _add(meeting, 0, -threads)
        _add(meeting, 1, 1)
        return
    spins = 0
    while _add(meeting, 1, 0) == number:
        spins += 1
        if spins > _SPINS:
            _yield()


@compiled_sums("i8[::1], i8")
def meet_all(meeting: I64, threads: int) -> None:
    """`meet`, callable from Python."""
    meet(meeting, threads)
