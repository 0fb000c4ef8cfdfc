"""The compiled step: kernels are compiled before, memory does not grow, and threads end together."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from state.compiled import FIRST_CALLS
from state.config.settings import Settings
from state.kernels import Kernels
from state.microbatch.batch import MicroBatch
from state.microbatch.codec import decode, encode
from tests.trainer.batches import SPEC, START_MS, micro_batch
from tests.trainer.engine.test_step import settings
from trainer.engine.adam import HostAdam
from trainer.engine.compiled.threads import Threads, meet
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


SIZES = range(100, 300)


class MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def used_bytes() -> int:
    """What the process has asked for and not given back, but for large pieces."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = MallocInfo
    return int(ask().uordblks)


def test_nothing_is_kept_for_each_number_of_rows() -> None:
    settings = Settings()
    trainer = Trainer(dataclasses.replace(settings, trainer=dataclasses.replace(settings.trainer, device="cpu")), SPEC)

    def step(rows: int) -> None:
        # The same rows each time: all ids have their place.
        trainer.step(micro_batch(rows, users=50, items=50, categories=8))

    for _ in range(3):
        step(SIZES[-1] + 1)
    before = used_bytes()
    for rows in SIZES:
        step(rows)
    assert used_bytes() - before < 15_000 * len(SIZES)


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


@pytest.mark.parametrize("failing", range(COUNT))
def test_a_failed_task_is_raised_once_the_others_have_ended(failing: int) -> None:
    threads, ended = Threads(COUNT), list[int]()

    def task(number: int) -> Callable[[], int]:
        def run() -> int:
            if number == failing:
                raise ValueError(f"task {number}")
            time.sleep(0.01)
            ended.append(number)
            return number

        return run

    with pytest.raises(ValueError, match=f"task {failing}"):
        threads.share(*map(task, range(COUNT)))
    others = [number for number in range(COUNT) if number != failing]
    assert sorted(ended) == others
    assert threads.share(*map(task, others)) == others


@pytest.mark.parametrize("failing", range(COUNT))
def test_an_error_names_its_stage_and_thread(failing: int) -> None:
    def fail(thread: int) -> None:
        if thread == failing:
            raise ValueError("a record that cannot be learned")

    with pytest.raises(ValueError, match="cannot be learned") as failure:
        Threads(COUNT).run([lambda _: None], [fail], [lambda _: None])
    assert failure.value.__notes__ == [f"In stage 2 of 3 of a step, on thread {failing}."]


INTERRUPTED = """
import faulthandler, random, signal
from trainer.engine.compiled.threads import Threads

INTERRUPTS, EXIT_CODE = 3000, 7

def interrupt(*_):
    global interrupts
    interrupts += 1
    raise SystemExit(EXIT_CODE) if interrupts > INTERRUPTS else InterruptedError

faulthandler.dump_traceback_later(60, exit=True)
signal.signal(signal.SIGALRM, interrupt)
threads, chance, interrupts, begun = Threads(3), random.Random(5), 0, []
stages = [[begun.append]] * 3
while True:
    try:
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(2e-6, 1e-3))
        threads.run(*stages)
        threads.share(*[interrupt.__hash__] * 3)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except InterruptedError:
        signal.setitimer(signal.ITIMER_REAL, 0)
        begun.clear()
        threads.run(*stages)
        assert sorted(begun) == [0, 0, 0, 1, 1, 1, 2, 2, 2], begun
"""


def test_an_error_at_any_moment_of_the_calling_thread_ends_the_call_and_the_process_with_its_code() -> None:
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False)
    assert ended.returncode == 7, ended.stderr


def test_moments_that_decay_become_zero_and_never_subnormal() -> None:
    adam = HostAdam({"weight": np.full(4, 0.5, np.float32)}, learning_rate=0.01)
    adam.gradient[:] = (1.0, -1e-3, 1e-14, 0.0)
    least = np.finfo(np.float32).smallest_normal
    for _ in range(2000):
        adam.apply(adam.fast)
        moments = np.abs(np.concatenate([adam.slots()[f"weight.{kind}"] for kind in "mv"]))
        assert not ((moments > 0) & (moments < least)).any()
        adam.gradient[:] = 0.0
    assert not adam.slots()["weight.m"].any()
    moved = adam.weights["weight"].copy()
    adam.apply(adam.fast)
    np.testing.assert_array_equal(adam.weights["weight"], moved)
    assert (moved[:2] != 0.5).all()
