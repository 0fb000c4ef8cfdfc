"""A Beam Python worker, started by the worker pool: `python -m deploy.flink.worker CONTROL_ENDPOINT WORKER_ID`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType

import grpc
from apache_beam.runners.worker.sdk_worker import SdkHarness

from state.process import log_lines
from state.process.private_files import keep_private


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until the TaskManager closes the connection; returns the exit code."""
    control, worker = sys.argv[1:] if argv is None else argv
    threading.Thread(target=_end_with_pool, daemon=True).start()
    keep_private()
    log_lines.begin("worker")
    # The job's own steps report their errors.
    logging.getLogger("apache_beam").setLevel(logging.ERROR)

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit

    # SystemExit closes what the steps of a job left open, as after a closed connection.
    signal.signal(signal.SIGTERM, stop)
    # No state cache, as in Beam's own pool: steps cache what they read where that is safe.
    try:
        SdkHarness(control, worker_id=worker, state_cache_size=0, data_buffer_time_limit_ms=-1).run()
    except grpc.RpcError as closed:
        # Every job ends with this error, and so does every TaskManager that dies.
        logging.getLogger(__name__).info("the connection to %s is closed (%s)", control, closed.code().name)
    return 0


def _end_with_pool() -> None:
    """Ends the process when the pool's end of standard input closes, however the pool ended."""
    # Not `sys.stdin`: its lock would be held when Python exits.
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
