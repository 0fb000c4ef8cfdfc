"""Threads that share the loops and the independent tasks of a step.

A loop is divided into fixed blocks, and each block is computed by one thread. So any number of threads gives the same
bits. Compiled loops wait for the blocks of other threads by counters in shared memory (`advance`, `wait_for`).
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from operator import length_hint
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from state.compiled import compiled_sums, part_of_sums

I64 = npt.NDArray[np.int64]
Work = Callable[[int], None]
"""The work of one thread, called with the thread's number."""

_SPINS = 20_000
"""How often a waiting thread spins before it sleeps: some 200 microseconds."""

_PAUSE_US = 20

_RELEASED = 1 << 62
"""A counter that no thread waits to exceed."""

_sleep: Any = types.ExternalFunction("usleep", types.int32(types.uint32))


class Threads:
    """Runs functions once per thread. The calling thread is one of them.

    An error on any thread ends the call on all of them. So does an exception that a signal handler raises at any moment.

    Attributes:
        count: Threads.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        for thread in range(1, count):
            threading.Thread(target=_serve, args=(self._calls,), name=f"step-{thread}", daemon=True).start()
        weakref.finalize(self, _end, self._calls, count - 1)

    def run(self, *stages: Sequence[Work], progress: I64 | None = None) -> None:
        """Calls the works of each stage as `work(thread)`, in turn, on all threads in parallel.

        A stage begins once all threads have ended the one before it. Returns when all calls have returned. After a
        failed call no thread begins another stage, and none waits for `progress` any longer.

        Args:
            stages: The works of each stage.
            progress: The counters by which works of a stage wait for each other.

        Raises:
            Exception: What a failed call raised, first that of the calling thread; a note names the stage.
        """
        ended, failed = np.zeros(len(stages), np.int64), threading.Event()

        def part(thread: int) -> None:
            for number, stage in enumerate(stages):
                if number:
                    meet(ended, number - 1, self.count)
                if failed.is_set():
                    return
                try:
                    for work in stage:
                        work(thread)
                except BaseException as error:
                    error.add_note(f"In stage {number + 1} of {len(stages)} of a step, on thread {thread}.")
                    raise

        def release() -> None:
            failed.set()
            ended[:] = self.count
            if progress is not None:
                progress[:] = _RELEASED

        self._together(part, self.count, release)

    def share(self, *tasks: Callable[[], Any]) -> list[Any]:
        """Calls each of some tasks on one of the threads, in parallel; returns their results when all have returned.

        No task may read what another one writes, or use these threads. A single thread calls the tasks in their order.
        """
        results: list[Any] = [None] * len(tasks)
        waiting = iter(range(len(tasks)))

        def take(_: int) -> None:
            for number in waiting:
                results[number] = tasks[number]()

        self._together(take, min(len(tasks), self.count), lambda: None)
        return results

    def _together(self, call: Work, count: int, release: Callable[[], None]) -> None:
        """Calls `call(thread)` on `count` threads in parallel, and returns when all have returned.

        After an error on one of them, `release` ends the waits of the others.
        """
        returned, failures = np.zeros(1, np.int64), list[BaseException]()

        def run(thread: int) -> None:
            try:
                call(thread)
            except BaseException as error:  # noqa: BLE001 - raised in the calling thread
                failures.append(error)
                release()
            finally:
                # Only the calling thread waits, and not for futures, which take longer.
                meet(returned, 0, 0)

        calls = iter([partial(run, thread) for thread in range(1, count)])
        try:
            # One call of C code: a signal's handler runs before it or after it, so all calls are sent or none.
            deque(map(self._calls.put, calls), maxlen=0)
            call(0)
            reach(returned, 0, count - 1)
        except BaseException:
            release()
            reach(returned, 0, count - 1 - length_hint(calls))
            raise
        if failures:
            raise failures[0]


def _serve(calls: SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := calls.get()) is not None:
        call()


def _end(calls: SimpleQueue[Callable[[], None] | None], count: int) -> None:
    for _ in range(count):
        calls.put(None)


def _adding(_context: Any, array: Any, index: Any, value: Any) -> Any:
    """Adds to one entry of an int64 array, atomically; returns the previous value."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        at = cgutils.get_item_pointer(context, builder, signature.args[0], array, [arguments[1]])
        return builder.atomic_rmw("add", at, arguments[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), generate


advance: Any = intrinsic(_adding)
"""`advance(counters, index, number)`: adds to a counter. Writes before it are visible to threads that waited for it."""


@part_of_sums
def wait_for(counters: I64, index: int, least: int) -> None:
    """Returns once a counter is at least `least`: spins shortly, then sleeps between polls."""
    polls = 0
    while advance(counters, index, 0) < least:
        polls += 1
        if polls > _SPINS:
            _sleep(_PAUSE_US)


@compiled_sums("i8[::1], i8, i8")
def meet(counters: I64, index: int, threads: int) -> None:
    """Returns once each of `threads` threads has called it with this counter, which was zero before."""
    advance(counters, index, 1)
    wait_for(counters, index, threads)


@compiled_sums("i8[::1], i8, i8")
def reach(counters: I64, index: int, least: int) -> None:
    """Returns once a counter is at least `least`."""
    wait_for(counters, index, least)
