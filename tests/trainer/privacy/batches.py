"""Micro-batches, settings and a trainer of the tests of private learning."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path

import numpy as np

from state.config.settings import Settings
from state.features.mask import Mask
from state.microbatch.batch import MicroBatch
from state.registry.log_line import WHOLE
from tests.trainer.batches import SPEC, micro_batch
from tests.trainer.clicks import small_settings
from trainer.engine.private_step import PrivateTrainer
from trainer.privacy import NoisePlace

KEY = "ab" * 32
BUDGET = (
    *("--events.label", "clicked", "--privacy.epsilon", "8", "--privacy.updates", "6"),
    *("--privacy.periods", "2"),
)  # fmt: skip
CONTEXT = ("--events.context", "tab")
"""What `labelled` has of context."""


def settings(path: Path, *flags: str, key: str = KEY) -> Settings:
    """Small ones with a budget, whose state and key lie in `path`."""
    path.mkdir(exist_ok=True)
    (path / "privacy.key").write_text(key)
    (path / "privacy.key").chmod(0o600)
    return small_settings(*at(path), *flags)


def at(path: Path) -> tuple[str, ...]:
    """The flags of `settings`."""
    return ("--paths.state", str(path), "--trainer.device", "cpu", *BUDGET)


@functools.cache
def shared(*flags: str) -> PrivateTrainer:
    """A trainer that is traced once, which takes seconds; clear it first."""
    with tempfile.TemporaryDirectory(prefix="springtide-private-") as folder:
        return PrivateTrainer(settings(Path(folder), *flags), SPEC)


def place(number: int) -> NoisePlace:
    """Of a record of a log."""
    return NoisePlace("cd" * 16, 0, 2 * number, 1, WHOLE, Mask.NONE, "ef" * 32)


def labelled(number: int, rows: int = 96) -> MicroBatch:
    """Batch `number` of a log; half of its rows have a label, and the categories of a user are distinct, as in a history."""
    made = micro_batch(rows, first=number * rows, categories=20, items=40, users=30, context=1)
    recent = made.recent_categories.copy()
    for row in recent:
        distinct = [one for one in dict.fromkeys(row.tolist()) if one]
        row[:] = 0
        row[: len(distinct)] = distinct
    windows = np.where(recent[:, :, None] != 0, made.category_windows, np.uint16(0))
    drawn = np.random.default_rng(number)
    label = np.where(drawn.random(rows) < 0.5, drawn.integers(0, 2, rows), np.nan).astype(np.float32)
    return dataclasses.replace(made, recent_categories=recent, category_windows=windows, label=label)
