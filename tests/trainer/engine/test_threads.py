"""The threads of a step: stages in order, and a clean end after a failure on any thread."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from trainer.engine.compiled.threads import Threads, meet

COUNT = 3


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("failing", range(COUNT))
def test_a_failure_on_any_thread_ends_all_and_the_next_run_is_whole(failing: int, stage: int) -> None:
    threads, begun = Threads(COUNT), list[tuple[int, int]]()

    def noting(number: int) -> Callable[[int], None]:
        return lambda thread: begun.append((number, thread))

    def fail(thread: int) -> None:
        if thread == failing:
            raise KeyboardInterrupt(f"thread {thread}")

    stages = [[noting(number)] for number in range(3)]
    with pytest.raises(KeyboardInterrupt, match=f"thread {failing}"):
        threads.run(*stages[:stage], [fail], *stages[stage:])
    assert sorted(begun) == [(number, thread) for number in range(stage) for thread in range(COUNT)]
    begun.clear()
    threads.run(*stages)
    assert [number for number, _ in begun] == [0] * COUNT + [1] * COUNT + [2] * COUNT


@pytest.mark.parametrize("failing", range(COUNT))
def test_a_failure_releases_the_threads_that_wait_inside_the_stage(failing: int) -> None:
    progress = np.zeros(1, np.int64)

    def fail_or_wait(thread: int) -> None:
        if thread == failing:
            raise ValueError("a record that cannot be learned")
        meet(progress, 0, COUNT)

    with pytest.raises(ValueError, match="cannot be learned"):
        Threads(COUNT).run([fail_or_wait], progress=progress)
