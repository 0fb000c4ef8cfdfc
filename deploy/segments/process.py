"""The keeper of segments: `python -m deploy.segments.process`, `springtide segments run`.

Runs on one serving host, beside its applier and workers, and follows what they
have. Nobody waits for it: where it is slow or dead, clicks, training and
answers go on, and it looks at all users when it is back.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time

from prometheus_client import CollectorRegistry

from deploy.segments.judging import open_host
from deploy.segments.keeping import SegmentKeeper, require_segments
from deploy.serving.host import Host
from state.compiled.preparing import Kernels
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import SettingsError, SpringtideError, of_disk
from state.layout import SEGMENTS_LOCK
from state.log import KERNELS, KafkaLog, Log
from state.metrics import SegmentMetrics, served
from state.process.ending import stop_on_signals
from state.process.garbage import keep_what_is_there
from state.process.part import run_part
from state.process.said_once import SaidOnce
from state.process.wall_clock import wall_ms

RETRY_S = 1.0
NICENESS = 10
"""Answers and clicks come first where cores are few."""
_log = logging.getLogger(__name__)


def run(settings: Settings, log: Log, registry: CollectorRegistry, stop: threading.Event) -> None:
    """Keeps the segments until `stop` is set.

    Args:
        settings: Of the loop.
        log: Where its topics are.
        registry: Where metrics are collected.
        stop: Ends it, within some tenths of a second.

    Raises:
        SettingsError: There are no segments, or an expression is none.
    """
    require_segments(settings)
    metrics, say = SegmentMetrics(registry), SaidOnce(_log.warning)
    host: Host | None = None
    keeper: SegmentKeeper | None = None
    keep_what_is_there()
    try:
        while not stop.is_set():
            try:
                if host is None:
                    host = open_host(settings)
                if keeper is None:
                    keeper = SegmentKeeper(settings, host.predictor, log, metrics, wall_ms, time.monotonic)
                keeper.step()
                say.clear()
                metrics.failures_in_a_row.set(0)
            except SettingsError:
                raise
            except (SpringtideError, OSError) as error:
                say(f"{of_disk(error)}; members stay as they are, and it is tried again")
                metrics.failures_in_a_row.inc()
                if keeper is not None:
                    # It looks at all users when it is connected again.
                    keeper.disconnect()
                stop.wait(RETRY_S)
    finally:
        for one in (keeper, host):
            if one is not None:
                one.close()


def main(argv: list[str] | None = None) -> int:
    """Runs the keeper with the settings of `argv` until a signal; returns the exit code."""
    stop = stop_on_signals()
    return run_part("segments", lambda settings: _run(settings, stop), argv, _log)


def _run(settings: Settings, stop: threading.Event) -> None:
    os.nice(NICENESS)
    require_segments(settings)
    with (
        DirectoryLock(settings.serving_dir, SEGMENTS_LOCK),
        served(settings.segments.metrics_port, settings.metrics.host) as registry,
    ):
        Kernels(registry, _log, uses=[KERNELS]).prepare(stop.is_set)
        run(settings, KafkaLog(settings.kafka), registry, stop)


if __name__ == "__main__":
    sys.exit(main())
