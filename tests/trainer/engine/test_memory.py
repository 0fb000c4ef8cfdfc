"""A trainer's memory does not grow with the sizes of its records."""

from __future__ import annotations

import ctypes
import dataclasses

from state.config.settings import Settings
from tests.trainer.batches import SPEC, micro_batch
from trainer.engine.step import Trainer

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
