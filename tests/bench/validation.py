"""Measures what the validation of live clicks costs: processor time for each row, as a share of a core at 5,000 clicks a second, and memory."""

from __future__ import annotations

import tempfile
import time
from itertools import repeat
from pathlib import Path

import numpy as np
import psutil
from prometheus_client import CollectorRegistry

from deploy.validation.process import COLUMNS, WindowJudge, Windows
from state.config.settings import Settings
from state.metrics import ValidationMetrics
from state.microbatch.codec import decode
from state.statistics.baselines import KeptWindows
from state.statistics.collecting import Statistics
from tests.bench.report import Figure, report
from tests.deploy.validation.live import CONTEXT, SPEC, START_MS, bootstrapped, columns, record, settings_at

CLICKS_PER_S = 5000
ROWS, RECORDS = 500, 60  # a micro-batch is cut each 100 ms


def main() -> None:
    """Takes the figures."""
    records = [record(columns(ROWS, seed=number), START_MS + 100 * number) for number in range(RECORDS)]
    before = psutil.Process().memory_info().rss
    windows = Windows(3600, lambda: Statistics(SPEC.actions, SPEC.names, CONTEXT), resumed=True)
    taken, decoding = [], []
    for number, value in enumerate(records):
        begun = time.process_time()
        found = decode(value, COLUMNS)
        decoded = time.process_time()
        windows.take(number, found, repeat(found).__next__)
        taken.append(time.process_time() - begun)
        decoding.append(decoded - begun)
    window = windows.open
    assert window is not None and window.statistics.rows == ROWS * RECORDS
    with tempfile.TemporaryDirectory() as state:
        settings: Settings = settings_at(Path(state))
        bootstrapped(settings)
        metrics = ValidationMetrics(CollectorRegistry())
        judge = WindowJudge(settings, SPEC.digest, KeptWindows(settings.validation_dir), metrics)
        begun = time.process_time()
        judge.judge(window)
        judging = time.process_time() - begun
    row_s = float(np.median(taken)) / ROWS
    share = row_s * CLICKS_PER_S + judging / Settings().validation.window_s
    report(
        "validation",
        {
            "row": Figure(1e6 * row_s, "us"),
            "row.decoding": Figure(1e6 * float(np.median(decoding)) / ROWS, "us"),
            "window.judging": Figure(1e3 * judging, "ms"),
            "share of a core at 5,000 clicks/s": Figure(100 * share, "%", "<= 5"),
            "window.statistics": Figure((psutil.Process().memory_info().rss - before) / 2**20, "MiB"),
        },
    )


if __name__ == "__main__":
    main()
